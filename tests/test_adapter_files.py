"""Adapter files describe themselves; published ones are known by their keys; the rest is refused by name."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import shared
from kvae_comfyui.adapters.files import LatentAdapter, load_adapter, save_adapter
from kvae_comfyui.adapters.hybrid import HybridVAE
from kvae_comfyui.adapters.networks import Affine, Published, Residual
from kvae_comfyui.adapters.spaces import SPACES, space
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.kvae.pixels import hunyuan_from_kvae, kvae_from_hunyuan

H, K = space("hunyuan_video"), space("kvae_3d_1.0")


@pytest.mark.parametrize("network", [Affine(16, 16, 1), Residual(16, 16, 8, 1), Published(16, 16)], ids=type)
def test_round_trip(tmp_path, network):
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
    with pytest.raises(WeightsError, match="does not say which way it maps; name it adapter_hunyuan_to_kvae3d"):
        load_adapter(renamed)
    assert load_adapter(renamed, ("kvae_3d_1.0", "hunyuan_video")).source == K


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


def test_hybrid_is_the_sum_of_its_parts(small_kvae):
    h2k = LatentAdapter(Affine(16, 16, 3), H, K).requires_grad_(False)
    k2h = LatentAdapter(Affine(16, 16, 3), K, H).requires_grad_(False)
    vae = HybridVAE(small_kvae, h2k, k2h)
    x = torch.rand(1, 3, 9, 32, 40) * 2 - 1
    z = vae.encode(x)
    assert torch.equal(z, k2h(small_kvae.encode(kvae_from_hunyuan(x))))
    assert torch.equal(vae.decode(z), hunyuan_from_kvae(small_kvae.decode(h2k(z))))
    assert vae.encode(x[:, :, :7]).shape[2] == 3  # 7 frames are padded to 9


def test_hybrid_with_one_adapter_says_what_is_missing(small_kvae):
    h2k = LatentAdapter(Affine(16, 16, 1), H, K)
    with pytest.raises(WeightsError, match="no kvae_3d_1.0 → hunyuan_video adapter .*adapter_kvae3d_to_hunyuan"):
        HybridVAE(small_kvae, decode_adapter=h2k).encode(torch.zeros(1, 3, 1, 32, 32))
    k2h = LatentAdapter(Affine(16, 16, 1), K, H)
    with pytest.raises(WeightsError, match="no hunyuan_video → kvae_3d_1.0 adapter .*adapter_hunyuan_to_kvae3d"):
        HybridVAE(small_kvae, encode_adapter=k2h).decode(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(WeightsError, match="needs an adapter"):
        HybridVAE(small_kvae)


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
        space("wan")
