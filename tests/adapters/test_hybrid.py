"""HybridVAE: a KVAE and adapters, one after the other, on one device, and only if they were made for each other."""

import pytest
import torch
from safetensors.torch import save_file

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import load_adapter, save_adapter
from kvae_comfyui.adapters.hybrid import HybridVAE
from kvae_comfyui.adapters.networks import Affine, PointwiseNet, Residual
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.kvae import KVAE, WeightsError, load_kvae, save_kvae
from kvae_comfyui.kvae.load import described_state
from kvae_comfyui.kvae.pixels import hunyuan_from_kvae, kvae_from_hunyuan
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS, load_hunyuan_vae, load_kvae_for_training

H, K = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")


def test_hybrid_vae_is_kvae_and_adapters_one_after_the_other(small_kvae):
    h2k = LatentAdapter(Affine(16, 16, 3), H, K).requires_grad_(False)
    k2h = LatentAdapter(Affine(16, 16, 3), K, H).requires_grad_(False)
    vae = HybridVAE(small_kvae, h2k, k2h)
    x = torch.rand(1, 3, 9, 32, 40) * 2 - 1
    z = vae.encode(x)
    assert torch.equal(z, k2h(small_kvae.encode(kvae_from_hunyuan(x))))
    assert torch.equal(vae.decode(z), hunyuan_from_kvae(small_kvae.decode(h2k(z))))
    assert vae.encode(x[:, :, :7]).shape[2] == 3  # 7 frames are padded to 9


def test_hybrid_vae_with_one_adapter_names_the_missing_one(small_kvae):
    h2k = LatentAdapter(Affine(16, 16, 1), H, K)
    with pytest.raises(WeightsError, match="no kvae_3d_1.0 → hunyuan_video adapter .*adapter_kvae3d_to_hunyuan"):
        HybridVAE(small_kvae, decode_adapter=h2k).encode(torch.zeros(1, 3, 1, 32, 32))
    k2h = LatentAdapter(Affine(16, 16, 1), K, H)
    with pytest.raises(WeightsError, match="no hunyuan_video → kvae_3d_1.0 adapter .*adapter_hunyuan_to_kvae3d"):
        HybridVAE(small_kvae, encode_adapter=k2h).decode(torch.zeros(1, 16, 1, 4, 4))


def test_hybrid_vae_without_adapters_is_the_kvae_with_the_pixels_of_hunyuan_video(small_kvae):
    vae, x = HybridVAE(small_kvae), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert vae.space == K
    z = vae.encode(x)
    assert torch.equal(z, small_kvae.encode(kvae_from_hunyuan(x)))
    assert torch.equal(vae.decode(z), hunyuan_from_kvae(small_kvae.decode(z)))


# ---- frozen, and where the KVAE is


def test_a_loaded_adapter_is_frozen_and_a_decode_builds_no_graph(tmp_path, small_kvae):
    for name, direction in (("h2k", (H, K)), ("k2h", (K, H))):
        save_adapter(tmp_path / f"{name}.safetensors", LatentAdapter(Residual(16, 16, 8, 1), *direction))
    h2k, k2h = (load_adapter(tmp_path / f"{name}.safetensors") for name in ("h2k", "k2h"))
    assert not any(parameter.requires_grad for parameter in (*h2k.parameters(), *k2h.parameters()))
    vae = HybridVAE(small_kvae, h2k, k2h)
    z = vae.encode(torch.zeros(1, 3, 5, 32, 32))
    assert not z.requires_grad
    assert not vae.decode(z).requires_grad
    assert not any(frames.requires_grad for frames in vae.decode_stream(z))
    assert HybridVAE(small_kvae, LatentAdapter(Affine(16, 16), H, K)).decode(z).requires_grad  # not frozen


@pytest.mark.parametrize("moved", ["before", "after", "as a whole"])
def test_adapters_go_where_the_kvae_is(small_kvae, moved):
    """The meta device stands in for a GPU: it also refuses to compute with tensors on the CPU."""
    h2k, k2h = LatentAdapter(Affine(16, 16), H, K), LatentAdapter(Affine(16, 16), K, H)
    if moved == "before":
        small_kvae.to("meta")
    vae = HybridVAE(small_kvae, h2k, k2h)
    if moved != "before":
        (vae if moved == "as a whole" else small_kvae).to("meta")
    z = vae.encode(torch.zeros(1, 3, 5, 32, 32))
    assert z.is_meta and z.shape == (1, 16, 2, 4, 4)
    x = vae.decode(torch.zeros(1, 16, 2, 4, 4))
    assert x.is_meta and x.shape == (1, 3, 5, 32, 32)


def test_latents_and_pixels_that_are_not_finite_are_refused(small_kvae):
    vae = HybridVAE(small_kvae, LatentAdapter(Affine(16, 16), H, K), LatentAdapter(Affine(16, 16), K, H))
    z, x = torch.zeros(1, 16, 2, 4, 4), torch.zeros(1, 3, 5, 32, 32)
    z[0, 3, 1, 2, 2], x[0, 0, 0, 0, 0] = torch.nan, torch.inf
    for decode in (vae.decode, lambda z: next(vae.decode_stream(z))):
        with pytest.raises(ValueError, match="1 of 512 values of this latent are NaN or infinite"):
            decode(z)
        for bad in (z.to(torch.int8), torch.zeros_like(z, dtype=torch.complex64), torch.zeros_like(z) > 0):
            with pytest.raises(ValueError, match="This latent is of .*; expected a tensor of float32"):
                decode(bad)
    with pytest.raises(ValueError, match="1 of 15360 values of these pixels are NaN or infinite"):
        vae.encode(x)


# ---- made for which weights


@pytest.fixture
def tiny():
    return {name: load_adapter(path) for name, path in TINY_ADAPTERS.items()}


def test_the_embedded_adapters_know_the_embedded_vaes(tiny):
    vaes = load_hunyuan_vae("tiny", "cpu"), load_kvae_for_training("tiny", "cpu")
    expected = {vae.space.name: VAEWeights(vae.digest, vae.signature) for vae in vaes}
    assert tiny["h2k"].weights == tiny["k2h"].weights == expected


@pytest.mark.parametrize("vae", [HybridVAE, HostVAE])
def test_an_adapter_of_other_weights_is_refused(tiny, small_kvae, vae):
    other = KVAE(load_kvae(TINY["kvae"]).config)  # of one shape with the tiny one
    for kvae in (small_kvae, other):
        for roles in ({"decode_adapter": tiny["h2k"]}, {"encode_adapter": tiny["k2h"]}):
            with pytest.raises(
                WeightsError,
                match="made for this project's tiny KVAE .*; this is the kvae_3d_1.0 VAE",
            ):
                vae(kvae, **roles)
    published = LatentAdapter(PointwiseNet(16, 16), H, K)  # it does not name its weights
    assert vae(small_kvae, decode_adapter=published)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_weights_in_another_file_are_accepted(tmp_path, tiny, dtype):
    save_kvae(tmp_path / "converted.safetensors", load_kvae(TINY["kvae"]), dtype, {})
    for loaded_as in (torch.float32, torch.bfloat16):
        assert HybridVAE(load_kvae(tmp_path / "converted.safetensors", loaded_as), tiny["h2k"], tiny["k2h"])
    save_file(described_state(load_kvae(TINY["kvae"], dtype)), tmp_path / "saved.safetensors")
    assert HybridVAE(load_kvae(tmp_path / "saved.safetensors"), tiny["h2k"], tiny["k2h"])


def test_a_pair_for_two_foreign_vaes_is_refused(tiny):
    changed = {
        "hunyuan_video": VAEWeights("", tuple(-value for value in tiny["k2h"].weights["hunyuan_video"].signature))
    }
    k2h = LatentAdapter(tiny["k2h"].network, K, H, weights=changed)
    with pytest.raises(
        WeightsError,
        match="for two VAEs: to decode, for this .*; to encode, for the hunyuan_video VAE",
    ):
        HybridVAE(load_kvae(TINY["kvae"]), tiny["h2k"], k2h)
