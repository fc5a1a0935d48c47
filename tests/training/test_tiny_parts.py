"""The parts of the small VAEs of 4x16x16 pixels, and the linear codecs that they are trained beside."""

import pytest
import torch

from conftest import moving_picture
from kvae_comfyui.kvae import KVAE
from kvae_comfyui.training.tiny.components import fit_codec, pixel_blocks, repeat_first
from kvae_comfyui.training.tiny.data import Stage
from kvae_comfyui.training.tiny.model import build, decode, parts_of, posterior_of
from kvae_comfyui.training.tiny.parts import ENCODES, LEVELS, MIDDLE, PARTS, Neighbours
from kvae_comfyui.training.tiny.training import WARMUP_STEPS, Falls

MODELS = {"kvae-t4s16": 64, "hunyuan-1.5": 32}


def random_weights(vae):
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vae.eval()


@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_the_parts_make_up_the_whole(model):
    vae = random_weights(build(model))
    parts, x = parts_of(vae), torch.rand(2, 3, 9, 32, 32) * 2 - 1
    h = parts.fine_encoder(x)
    assert h.shape[1] == parts.encoder_width
    mean, logvar = parts.coarse_encoder(h).chunk(2, dim=1)
    posterior = posterior_of(vae, x)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(logvar.clamp(-30, 20), posterior.logvar.clamp(-30, 20))
    h = parts.coarse_decoder(mean)
    for level in reversed(range(MIDDLE)):
        assert h.shape[1] == parts.decoder_widths[level + 1]
        h = parts.up(level, h, mean)
    torch.testing.assert_close(h, decode(vae, mean))


@pytest.mark.parametrize("model", MODELS)
def test_a_part_fits_between_its_neighbours_and_trains_alone(model):
    """Its input and its goal have the sizes of its level, and only its own weights get gradients."""
    vae = build(model)
    parts, x = parts_of(vae), torch.rand(2, 3, 5, 32, 32) * 2 - 1
    neighbours = Neighbours(parts, [x], 16, MODELS[model], torch.Generator().manual_seed(0))
    counts = {}
    for part in PARTS:
        vae.zero_grad()
        z = neighbours.encode(x).chunk(2, dim=1)[0] if part in ENCODES else neighbours.latents.encode(x)
        y = neighbours.decode(part, x, z)
        assert y.shape[3:] == x.shape[3:]
        (y[:, :, -5:] - x).square().mean().backward()
        counts[part] = {name for name, parameter in vae.named_parameters() if parameter.grad is not None}
    alone = [counts[part] for part in PARTS if part != "coarse"]
    # the parts share no weight and leave none out
    assert sum(map(len, alone)) == len(set().union(*alone)) == len(list(vae.parameters()))
    assert counts["coarse"] == counts["coarse-encoder"] | counts["coarse-decoder"]
    assert isinstance(vae, KVAE) == (parts.frames[MIDDLE] == 4) and len(LEVELS) == MIDDLE


def test_a_linear_codec_keeps_the_principal_components():
    """With a channel for each value of a block nothing is lost; with fewer, a block's projection is left."""
    x = torch.stack([moving_picture(5, 16, 16, seed) for seed in range(40)]) / 127.5 - 1
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for channels in (12, 16):
        codec = fit_codec([x], 1, 2, channels, torch.Generator().manual_seed(1))
        y = codec.encode(x)
        assert y.shape == (40, channels, 5, 8, 8)
        torch.testing.assert_close(codec.decode(y), x, atol=1e-4, rtol=0)
    codec = fit_codec([x], 1, 2, 96, torch.Generator().manual_seed(1), fold=2)
    y = codec.encode(x)
    assert y.shape == (40, 96, 3, 4, 4)
    torch.testing.assert_close(codec.decode(y), repeat_first(x, 2), atol=1e-4, rtol=0)
    # channel 0 of the second of the 2x2x2 blocks, which lies to the right of the first
    torch.testing.assert_close(
        y[:, 12], fit_codec([x], 1, 2, 12, torch.Generator().manual_seed(1)).encode(x)[:, 0, [0, 1, 3], ::2, 1::2]
    )
    codec = fit_codec([x], 2, 4, 10, torch.Generator().manual_seed(1))
    blocks = pixel_blocks(x, 4, frames=2).flatten(0, 3)
    axes = torch.linalg.eigh(blocks.T.cov())[1][:, -10:]
    torch.testing.assert_close(codec.encoder_fc @ codec.decoder_cf, axes @ axes.T, atol=1e-3, rtol=0)


def test_the_rate_falls_anew_for_each_part():
    falls = Falls(1.0, [Stage(100, 64, 2, "coarse"), Stage(100, 64, 2, "level-0"), Stage(50, 64, 2, "level-0")])
    assert falls.total_steps == 250
    assert falls.rate(99) == pytest.approx(0.01)
    assert falls.rate(100) == pytest.approx(1 / WARMUP_STEPS)
    assert falls.rate(200) == pytest.approx(1 - 100 / 150)
