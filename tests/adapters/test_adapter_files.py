"""Adapter files describe themselves; published ones are recognised by their keys; other files are refused by name."""

import inspect
import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import shared
from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import direction_of, load_adapter, save_adapter, weights_of
from kvae_comfyui.adapters.hybrid import HybridVAE
from kvae_comfyui.adapters.networks import Affine, PointwiseNet, Residual
from kvae_comfyui.adapters.spaces import SPACES, latent_space
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.vaes import TINY_ADAPTERS

H, K = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")


@pytest.mark.parametrize("network", [Affine(16, 16, 1), Residual(16, 16, 8, 1), PointwiseNet(16, 16)], ids=type)
def test_a_pair_survives_writing_and_reading(tmp_path, network):
    adapter = LatentAdapter(network, H, K, training={"pairs": 7}, metrics={"val_mse": 0.25})
    save_adapter(tmp_path / "a.safetensors", adapter)
    loaded = load_adapter(tmp_path / "a.safetensors", ("hunyuan_video", "kvae_3d_1.0"))
    assert (loaded.source, loaded.target) == (H, K)
    assert loaded.training_info == {"pairs": 7}
    assert loaded.metrics == {"val_mse": 0.25}
    z = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(z), adapter(z))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["source_space"] == "hunyuan_video"
    assert json.loads(metadata["network"])["in_channels"] == 16
    assert "x/127.5-1" in metadata["pixels"] and "raw" in metadata["latents"]


def test_published_files(tmp_path):
    original = shared("seed_adapters/adapter_hunyuan_to_kvae3d.safetensors")
    adapter = load_adapter(original)
    assert (adapter.source.name, adapter.target.name) == ("hunyuan_video", "kvae_3d_1.0")
    renamed = tmp_path / "mine.safetensors"
    shutil.copyfile(original, renamed)
    with pytest.raises(WeightsError, match="which way this adapter maps; rename it to adapter_hunyuan_to_kvae3d"):
        load_adapter(renamed)
    assert load_adapter(renamed, ("kvae_3d_1.0", "hunyuan_video")).source == K
    with pytest.raises(WeightsError, match="for 16 channels on both sides; hunyuan_video_1.5 → .* has 32 and 64"):
        load_adapter(renamed, ("hunyuan_video_1.5", "kvae_3d_2.0_t4s16"))


def test_the_direction_is_read_from_the_header(tmp_path):
    adapter = LatentAdapter(Affine(16, 16), H, K)
    save_adapter(tmp_path / "x.safetensors", adapter)
    assert direction_of(tmp_path / "x.safetensors") == ("hunyuan_video", "kvae_3d_1.0")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert direction_of(tmp_path / "y.safetensors") is None
    assert adapter.about() == "hunyuan_video → kvae_3d_1.0, Affine, 6,928 weights"


def test_swapped_adapters_are_noticed(tmp_path, small_kvae):
    save_adapter(tmp_path / "h2k.safetensors", LatentAdapter(Affine(16, 16, 1), H, K))
    with pytest.raises(WeightsError, match="maps hunyuan_video → kvae_3d_1.0; expected .* the two files are swapped"):
        load_adapter(tmp_path / "h2k.safetensors", ("kvae_3d_1.0", "hunyuan_video"))
    k2h = LatentAdapter(Affine(16, 16, 1), K, H)
    with pytest.raises(WeightsError, match="the two adapters are swapped"):
        HybridVAE(small_kvae, decode_adapter=k2h)


def test_other_files_are_refused_by_name(tmp_path, small_kvae):
    save_file(small_kvae.state_dict(), tmp_path / "kvae.safetensors")
    with pytest.raises(WeightsError, match="this is a KVAE-3D; expected a latent adapter"):
        load_adapter(tmp_path / "kvae.safetensors")
    save_adapter(tmp_path / "a.safetensors", LatentAdapter(Affine(16, 16, 1), H, K))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, tmp_path / "b.safetensors", metadata | {"source_space": "sdxl"})
    with pytest.raises(WeightsError, match="no latent space is called 'sdxl'"):
        load_adapter(tmp_path / "b.safetensors")
    tensors.pop("affine.conv.bias")
    save_file(tensors, tmp_path / "c.safetensors", metadata)
    with pytest.raises(WeightsError, match="1 tensors do not fit its own description, first affine.conv.bias"):
        load_adapter(tmp_path / "c.safetensors")


def test_a_latent_of_another_space_is_named():
    adapter = LatentAdapter(Affine(16, 16, 1), H, K)
    with pytest.raises(ValueError, match=r"\[1, 32, 2, 4, 4\]; a hunyuan_video latent is \[B, 16, t, h, w\]"):
        adapter(torch.randn(1, 32, 2, 4, 4))


def test_scaling_is_that_of_diffusers():
    for name, vae in (
        ("hunyuan_video", AutoencoderKLHunyuanVideo),
        ("hunyuan_video_1.5", AutoencoderKLHunyuanVideo15),
    ):
        assert inspect.signature(vae.__init__).parameters["scaling_factor"].default == SPACES[name].scaling_factor
    z = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(H.scale(z), z * 0.476986)
    torch.testing.assert_close(H.unscale(H.scale(z)), z)
    assert torch.equal(K.scale(z), z)
    assert H.latent_shape(33, 240, 320) == (16, 9, 30, 40)
    with pytest.raises(ValueError, match="no latent space is called 'wan'"):
        latent_space("wan")


# ---- damaged and foreign files


def rewritten(path, tensors=None, **metadata):
    """An adapter file with other metadata (None: without that entry), or other tensors."""
    save_adapter(path, LatentAdapter(Residual(16, 16, 8, 1), H, K))
    with safe_open(path, "pt") as file:
        old, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    said = {key: value for key, value in (said | metadata).items() if value is not None}
    save_file(old | (tensors or {}), path, said)
    return path


CHANNELS = {"in_channels": 16, "out_channels": 16}
NETWORK = {"name": "residual", "width": 8, "blocks": 1} | CHANNELS


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"network": json.dumps(NETWORK | {"width": 10**6})}, "width is 1000000; expected a whole number"),
        ({"network": json.dumps(NETWORK | {"width": 4000})}, "tensors do not fit its own description"),
        ({"network": json.dumps(NETWORK | {"width": -8})}, "width is -8"),
        ({"network": json.dumps(NETWORK | {"width": 0})}, "width is 0"),
        ({"network": json.dumps(NETWORK | {"width": True})}, "width is True"),
        ({"network": json.dumps(NETWORK | {"width": "8"})}, "width is '8'"),
        ({"network": json.dumps(NETWORK | {"blocks": 10**9})}, "1000000000 blocks in"),
        ({"network": json.dumps(NETWORK | {"blocks": 14})}, "do not fit its own description"),
        ({"network": json.dumps(NETWORK | {"in_channels": 32})}, "a network from 32 to 16 channels"),
        ({"network": json.dumps(NETWORK | {"name": "unet"})}, "no adapter network is called 'unet'"),
        ({"network": json.dumps(NETWORK | {"name": None})}, "no adapter network is called 'None'"),
        ({"network": json.dumps(NETWORK | {"layers": 3})}, "does not accept these settings"),
        (
            {"network": json.dumps({"name": "affine", "in_channels": 16, "out_channels": 16, "kernel": 2})},
            "kernel is 2",
        ),
        (
            {"network": json.dumps({"name": "published", "in_channels": 16, "out_channels": 16, "width": 7})},
            "divisible",
        ),
        ({"network": "null"}, "expected an object"),
        ({"network": "[1]"}, "expected an object"),
        ({"network": "7"}, "expected an object"),
        ({"network": "{}"}, "'name'"),
        ({"network": None}, "'network'"),
        ({"network": "[" * 100_000}, "nested too deeply"),
        ({"training": "[]"}, "expected an object"),
        ({"training": '{"a":' * 100_000}, "nested too deeply"),
        ({"metrics": '"good"'}, "expected an object"),
        ({"weights": "[]"}, "expected an object"),
        ({"weights": '{"kvae_3d_1.0": 5}'}, "expected an object"),
        ({"weights": '{"kvae_3d_1.0": {"signature": ["a"]}}'}, "signature is ['a']"),
        ({"source_space": None}, "'source_space'"),
        ({"source_space": "sdxl"}, "no latent space is called 'sdxl'"),
        ({"format": "kvae-latent-adapter/3"}, "of the format kvae-latent-adapter/3; expected kvae-latent-adapter/1 or"),
        ({"format": None}, "this latent adapter has no metadata of the format"),
    ],
    ids=lambda each: "" if isinstance(each, str) else "-".join(f"{k} {str(v)[:40]}" for k, v in each.items()),
)
def test_a_file_whose_metadata_do_not_fit_is_refused_in_one_line(tmp_path, metadata, words):
    """Before a network of the claimed size is built."""
    path = rewritten(tmp_path / "a.safetensors", **metadata)
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_metadata_of_a_newer_version_are_ignored(tmp_path):
    weights = json.dumps({"kvae_3d_1.0": {"sha256": "ab", "signature": [1.0], "colour": "red"}})
    adapter = load_adapter(rewritten(tmp_path / "a.safetensors", weights=weights, author="me"))
    assert adapter.weights == {"kvae_3d_1.0": VAEWeights("ab", (1.0,))}


def test_weights_that_are_not_finite_floats_are_refused(tmp_path):
    for bad, words in (
        (torch.full((16,), torch.nan), "affine.conv.bias holds NaN or infinite values"),
        (torch.ones(16, dtype=torch.int32), "affine.conv.bias is of torch.int32; expected float weights"),
    ):
        with pytest.raises(WeightsError, match=words):
            load_adapter(rewritten(tmp_path / "a.safetensors", {"affine.conv.bias": bad}))
    half = rewritten(tmp_path / "a.safetensors", {"affine.conv.bias": torch.ones(16).half()})
    assert {parameter.dtype for parameter in load_adapter(half).parameters()} == {torch.float32}


def test_folder_names_are_not_shown():
    adapter = LatentAdapter(
        Affine(16, 16, 1),
        H,
        K,
        {"config": {"latent_root": "/home/ann/latents", "out_h2k": r"C:\Users\ann\h.safetensors", "roots": ["/a/b"]}},
        {"report": "/home/ann/report.html", "sampling": "train/uniform"},
    )
    about = adapter.about()
    assert "ann" not in about and "/a" not in about
    for part in ("'latents'", "'h.safetensors'", "['b']", "report: report.html", "train/uniform"):
        assert part in about


@pytest.fixture
def tiny():
    return {name: load_adapter(path) for name, path in TINY_ADAPTERS.items()}


def test_the_weights_it_was_made_for_travel_with_the_file(tmp_path, tiny):
    save_adapter(tmp_path / "copy.safetensors", tiny["h2k"])
    assert load_adapter(tmp_path / "copy.safetensors").weights == tiny["h2k"].weights
    assert weights_of(tmp_path / "copy.safetensors")["kvae_3d_1.0"] == tiny["h2k"].weights["kvae_3d_1.0"].signature
