"""The start of the small HunyuanVideo 1.5 VAE: close to principal components without a step of training."""

import pytest
import torch

from conftest import moving_picture
from kvae_comfyui.training.tiny.components import pca_psnr
from kvae_comfyui.training.tiny.linear_start import start_linear
from kvae_comfyui.training.tiny.model import build, decode, posterior_of

SIZE = 9, 64, 64


@pytest.fixture(scope="module")
def clips():
    """Waves over noise of 2x2x2 pixels, uint8 [B, 3, 9, 64, 64]."""
    torch.manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.randn(16, 3, *(n // 2 + 1 for n in SIZE)), scale_factor=2)
    waves = torch.stack([moving_picture(*SIZE, seed) for seed in range(16)]).float()
    return (waves + 12 * noise[:, :, : SIZE[0], : SIZE[1], : SIZE[2]]).clamp(0, 255).byte()


@torch.inference_mode()
def test_it_codes_nearly_as_well_as_principal_components(clips):
    vae = build("hunyuan-1.5")
    x = clips / 127.5 - 1
    start_linear(vae, x, logvar=-9.0)
    posterior = posterior_of(vae, x)
    error = (decode(vae, posterior.mean).clamp(-1, 1) - x).square()
    psnr = (10 * (4 / error[:, :, 1:].mean((1, 2, 3, 4))).log10()).mean().item()
    # 32 components of 4x16x16 pixels have the rate of 8 of 4x8x8, which are quicker to compute
    assert psnr > pca_psnr(list(clips), list(clips), side=8, count=8) - 3
    for block in (vae.decoder.mid_block.resnets[0], vae.decoder.up_blocks[1].resnets[0]):
        torch.nn.init.zeros_(block.conv2.conv.weight)
    without_gates = (decode(vae, posterior.mean).clamp(-1, 1) - x).square()
    assert error[:, :, 0].mean() < 0.5 * without_gates[:, :, 0].mean()
    assert posterior.logvar.mean().item() == pytest.approx(-9, abs=0.1)


@torch.inference_mode()
def test_the_seed_decides_the_rotation_of_the_latents(clips):
    x, means = clips / 127.5 - 1, []
    for seed in (1, 2):
        vae = build("hunyuan-1.5")
        torch.manual_seed(seed)
        start_linear(vae, x, logvar=-9.0)
        means.append(posterior_of(vae, x).mean.movedim(1, 0).flatten(1))
    assert not torch.allclose(*means, atol=0.5)
