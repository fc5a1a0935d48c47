"""Adapters between HunyuanVideo's grid and that of KVAE 2.0-t4s16, twice as coarse, in ComfyUI's nodes."""

import pytest
import torch

from kvae_comfyui.adapters import LatentAdapter, latent_space, save_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.kvae import save_kvae
from kvae_comfyui.serving.sample_clip import sample_clip
from small_models import small

H, K = latent_space("hunyuan_video"), latent_space("kvae_3d_2.0_t4s16")
ADAPTERS = {"h2k16.safetensors": (H, K), "k16_2h.safetensors": (K, H)}


@pytest.fixture
def files(base):
    """A small KVAE 2.0-t4s16 and its adapters in the models folder, for one test."""
    models = base / "models"
    save_kvae(models / "vae" / "t4s16.safetensors", small("2.0-t4s16"), torch.float32, {})
    for name, spaces in ADAPTERS.items():
        save_adapter(models / "latent_adapters" / name, LatentAdapter(Affine(64, 64), *spaces))
    yield
    for path in (models / "vae" / "t4s16.safetensors", *(models / "latent_adapters" / name for name in ADAPTERS)):
        path.unlink()


def test_convert_goes_to_the_coarser_grid_and_back(run, files):
    there, back = (run("KVAELoadAdapter", adapter_name=name)[0] for name in ADAPTERS)
    latent = {"samples": torch.randn(2, 16, 3, 4, 6)}
    (converted,) = run("KVAEConvertLatent", samples=latent, adapter=there)
    assert converted["samples"].shape == (2, 64, 3, 2, 3) and converted["kvae_space"] == K.name
    (again,) = run("KVAEConvertLatent", samples=converted, adapter=back)
    assert again["samples"].shape == latent["samples"].shape and again["kvae_space"] == H.name
    with pytest.raises(ValueError, match="5 rows and 6 columns; kvae_3d_2.0_t4s16 joins 2x2 .* for example 48x32"):
        run("KVAEConvertLatent", samples={"samples": torch.zeros(1, 16, 3, 5, 6)}, adapter=there)


def test_convert_keeps_the_audio_of_a_video_whose_grid_changes(run, files, comfy):
    nested = pytest.importorskip("comfy.nested_tensor", reason="needs a ComfyUI with nested latents").NestedTensor
    (there, _) = run("KVAELoadAdapter", adapter_name="h2k16.safetensors")
    video, audio = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 8, 30)
    (converted,) = run("KVAEConvertLatent", samples={"samples": nested((video, audio))}, adapter=there)
    found = converted["samples"].unbind()
    assert found[0].shape == (1, 64, 2, 2, 2) and torch.equal(found[1], audio)


def test_a_vae_serves_the_finer_latents(run, load, files):
    names = dict(zip(("decode_adapter", "encode_adapter"), ADAPTERS, strict=True))
    vae = load(kvae_name="t4s16.safetensors", **names)
    (latent,) = run("VAEEncode", pixels=sample_clip(9, 40, 56), vae=vae)
    assert latent["samples"].shape == (1, 16, 3, 4, 6)  # of 32x48 pixels
    (whole,) = run("VAEDecode", samples=latent, vae=vae)
    assert whole.shape == (9, 32, 48, 3)
    (tiles,) = run("VAEDecodeTiled", samples=latent, vae=vae, tile_size=512, overlap=64)
    torch.testing.assert_close(tiles, whole, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="joins 2x2 of them into one"):
        run("VAEDecode", samples={"samples": torch.zeros(1, 16, 2, 5, 4)}, vae=vae)


def test_a_clip_whose_sides_are_cropped_replaces_a_latent_of_that_size(run, load, files):
    names = dict(zip(("decode_adapter", "encode_adapter"), ADAPTERS, strict=True))
    vae, pixels = load(kvae_name="t4s16.safetensors", **names), sample_clip(9, 40, 56)
    (latent,) = run("KVAEEncode", pixels=pixels, vae=vae, samples={"samples": torch.zeros(1, 16, 3, 4, 6)})
    assert latent["samples"].shape == (1, 16, 3, 4, 6)  # of 32x48 pixels
    with pytest.raises(ValueError, match=r"This clip gives a latent \[1, 16, 3, 4, 6\]"):
        run("KVAEEncode", pixels=pixels, vae=vae, samples={"samples": torch.zeros(1, 16, 3, 5, 7)})
