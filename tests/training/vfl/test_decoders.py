"""Decoders with gradients, against the VAEs as they are."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import needs
from kvae_comfyui.adapters import HybridVAE, LatentAdapter, latent_space
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.training.vfl.decoders import hunyuan_decoder, kvae_decoder, smaller
from kvae_comfyui.training.vfl.tiny import tiny_pipeline
from small_models import small

needs.package("transformers", "requirements-vfl.txt")
SCALE = 1.03682  # of diffusers' config


@pytest.fixture(scope="module")
def vae():
    return tiny_pipeline().vae


def hybrid() -> HybridVAE:
    kvae = small("2.0-t4s16")
    adapter = LatentAdapter(Affine(32, 64), latent_space("hunyuan_video_1.5"), latent_space("kvae_3d_2.0_t4s16"))
    return HybridVAE(kvae, decode_adapter=adapter.requires_grad_(False))


def plain(vae, z):
    return (vae.decode(z / SCALE).sample / 2 + 0.5).clamp(0, 1)


def gradient(decode, z):
    """The pixels, their gradient by latents, and how many bytes were kept for it."""
    z, kept = z.clone().requires_grad_(), {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = decode(z)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weights).mean().backward()
    return y.detach(), z.grad, sum(kept.values())


def test_hunyuans_gradient_is_that_of_its_vae_and_keeps_less(vae):
    z = torch.randn(1, 32, 3, 2, 3)
    y, g, kept = gradient(lambda z: plain(vae, z), z)
    ours, ours_g, ours_kept = gradient(hunyuan_decoder(copy.deepcopy(vae)), z)
    assert y.shape == (1, 3, 9, 32, 48) and g.abs().max() > 0
    assert torch.equal(ours, y)
    torch.testing.assert_close(ours_g, g, rtol=1e-4, atol=1e-5 * g.abs().max().item())
    assert ours_kept < 0.25 * kept


def test_a_batch_is_decoded_as_its_clips(vae):
    decode = hunyuan_decoder(copy.deepcopy(vae))
    z = torch.randn(2, 32, 2, 2, 2)
    assert torch.equal(decode(z), torch.cat([decode(z[:1]), decode(z[1:])]))


def test_kvaes_gradient_is_that_without_checkpoints():
    vae, z = hybrid(), torch.randn(1, 32, 3, 2, 3)
    y, g, kept = gradient(lambda z: plain_kvae(vae, z), z)
    ours, ours_g, ours_kept = gradient(kvae_decoder(vae), z)
    assert y.shape == (1, 3, 9, 32, 48) and g.abs().max() > 0
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(ours_g, g, rtol=1e-4, atol=1e-5 * g.abs().max().item())
    assert ours_kept < 0.5 * kept


def plain_kvae(vae, z):
    return (vae.decode(z / SCALE) / 2 + 0.5).clamp(0, 1)


def test_a_kvae_of_other_latents_is_refused():
    with pytest.raises(ValueError, match="decodes kvae_3d_1.0; expected an adapter of hunyuan_video_1.5"):
        kvae_decoder(HybridVAE(small("1.0")))


@pytest.mark.parametrize("make", [lambda vae: hunyuan_decoder(copy.deepcopy(vae)), lambda _: kvae_decoder(hybrid())])
def test_the_first_latents_give_the_first_frames(make, vae):
    decode, z = make(vae), torch.randn(1, 32, 4, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(decode(smaller(z, latents=2)), decode(z)[:, :, :5], rtol=0, atol=1e-6)


def test_no_weight_collects_a_gradient(vae):
    decode = hunyuan_decoder(frozen := copy.deepcopy(vae).requires_grad_(True))
    decode(torch.randn(1, 32, 1, 2, 2, requires_grad=True)).mean().backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_a_smaller_picture_is_an_average():
    z = torch.arange(48.0).view(1, 1, 2, 4, 6)
    halved = smaller(z, scale=0.5)
    torch.testing.assert_close(halved, z.unflatten(4, (3, 2)).unflatten(3, (2, 2)).mean((4, 6)))
    assert smaller(z, scale=0.01).shape == (1, 1, 2, 1, 1)
    assert torch.equal(smaller(z), z) and smaller(z, latents=9).shape == z.shape
