"""Latents that we write are those that other programs read, and say themselves how to read them back."""

import pytest
import torch
from safetensors import safe_open

from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.kvae.errors import WeightsError
from kvae_comfyui.kvae.files import save_weights
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.serving.latent_writers import ENDINGS, save_clip

H, H15, K = (SPACES[name] for name in ("hunyuan_video", "hunyuan_video_1.5", "kvae_3d_1.0"))
SCALE, SCALE_15 = 0.476986, 1.03682


def clip(space, t=3, h=4, w=16):
    return torch.randn(1, space.channels, t, h, w)


def content(path):
    """The tensors and the metadata of a file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


CASES = [(form, space) for form in ENDINGS for space in (H, H15, K)]
CASES = [(f, s) for f, s in CASES if f in ("comfyui", "diffusers") or (s is H) or (f == "musubi" and s is H15)]


@pytest.mark.parametrize(("form", "space"), CASES, ids=lambda each: getattr(each, "name", each))
@pytest.mark.parametrize("t", [1, 3, 16])
def test_every_format_is_read_back_without_being_asked(tmp_path, form, space, t):
    """With 16 columns, and with 16 latent frames, the shape alone would fit two layouts."""
    z, path = clip(space, t), tmp_path / f"x{ENDINGS[form]}"
    save_clip(path, z, space, 4 * t - 3, form, {"made": "here"})
    found = load_latent(path)
    torch.testing.assert_close(found.z, z)
    assert (found.space, found.frames) == (space.name, 4 * t - 3)
    assert content(path)[1]["made"] == "here"


@pytest.mark.parametrize(("space", "scale", "side"), [(H, SCALE, 8), (H15, SCALE_15, 16)])
def test_musubi_gets_scaled_latents_without_a_batch(tmp_path, space, scale, side):
    z = clip(space).bfloat16()
    save_clip(tmp_path / "x.safetensors", z, space, 7, "musubi", {})
    tensors, metadata = content(tmp_path / "x.safetensors")
    (latent,) = tensors.values()
    assert list(tensors) == ["latent"] and latent.dtype is torch.float32 and latent.is_contiguous()
    torch.testing.assert_close(latent, z[0].float() * scale)
    assert (metadata["height"], metadata["width"], metadata["video_length"]) == (str(4 * side), str(16 * side), "9")
    assert "seeds" not in metadata  # musubi-tuner reads a number from it


def test_diffusers_and_kandinsky_get_their_layouts(tmp_path):
    z = clip(H)
    save_clip(tmp_path / "d.safetensors", z, H, 9, "diffusers", {})
    save_clip(tmp_path / "k.safetensors", z, H, 9, "kandinsky", {})
    torch.testing.assert_close(content(tmp_path / "d.safetensors")[0], {"latents": z * SCALE})
    torch.testing.assert_close(content(tmp_path / "k.safetensors")[0], {"latents": (z[0] * SCALE).permute(1, 2, 3, 0)})


@pytest.mark.parametrize(
    ("form", "space", "z", "words"),
    [
        ("musubi", K, clip(K), "musubi-tuner has no model of kvae_3d_1.0; expected hunyuan_video or hunyuan_video_1.5"),
        ("kandinsky", H15, clip(H15), "Kandinsky 5 does not read hunyuan_video_1.5; expected hunyuan_video"),
        ("musubi", H, clip(H15), "32"),
        ("diffusers", H, clip(H).fill_(torch.nan), "NaN"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_leaves_no_file(tmp_path, form, space, z, words):
    with pytest.raises(ValueError, match=words):
        save_clip(tmp_path / "x.safetensors", z, space, 9, form, {})
    assert list(tmp_path.iterdir()) == []


WEIGHTS = VAEWeights("ab", (0.25, -1.5, 3e-5))


@pytest.mark.parametrize("form", ENDINGS)
def test_the_weights_of_the_vae_are_named_and_read_back(tmp_path, form):
    path = tmp_path / f"x{ENDINGS[form]}"
    save_clip(path, clip(H), H, 9, form, {}, WEIGHTS)
    assert load_latent(path).weights == WEIGHTS
    save_clip(path, clip(H), H, 9, form, {})
    assert load_latent(path).weights is None


@pytest.mark.parametrize("text", ["[]", "{", '{"sha256": 5}', '{"signature": ["a"]}'])
def test_weights_that_are_not_described_are_refused(tmp_path, text):
    save_weights(tmp_path / "x.safetensors", {"latents": clip(H)}, {"kvae_space": H.name, "kvae_weights": text})
    with pytest.raises(WeightsError, match="kvae_weights do not describe the weights of a VAE") as caught:
        load_latent(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
