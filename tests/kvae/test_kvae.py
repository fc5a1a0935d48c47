"""KVAE equals diffusers' models, except for the frames that diffusers drops."""

import pytest
import torch
from diffusers import AutoencoderKLKVAEVideo, Kandinsky6SRVAE

from kvae_comfyui.kvae import KVAE, Execution, KVAEConfig, Recompute, pad_frames, padded_frames
from kvae_comfyui.kvae.load import official_key
from small_models import clip, latent, small


def in_diffusers(small_kvae):
    """Diffusers' model with the same weights."""
    theirs = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1).eval()
    names = {official_key(key): key for key in theirs.state_dict()}
    theirs.load_state_dict({names[key]: tensor for key, tensor in small_kvae.state_dict().items()})
    return theirs.requires_grad_(False)


@pytest.fixture
def pair(small_kvae):
    return small_kvae, in_diffusers(small_kvae)


def relative(a, b):
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 33, 49])
def test_equals_diffusers(pair, frames):
    ours, theirs = pair
    x = torch.rand(1, 3, frames, 32, 40) * 2 - 1
    z = theirs.encode(x).latent_dist.mode()
    assert relative(ours.encode(x), z) <= 1e-5
    assert relative(ours.decode(z), theirs.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 9, 17, 21, 33, 37, 41])
def test_version_two_equals_the_vae_of_kandinsky_6(frames, blocks):
    """Diffusers' implementation of 2.0-t4s16, for its super-resolution: independent of ours, with the same keys."""
    ours = small("2.0-t4s16", num_res_blocks=blocks)
    config = ours.config
    theirs = Kandinsky6SRVAE(
        encoder_block_out_channels=config.encoder_widths,
        decoder_block_out_channels=config.decoder_widths,
        layers_per_block=blocks,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x = clip(ours, frames)
    with torch.no_grad():
        moments = theirs.encode(x).latent_dist.parameters
        posterior = ours.posterior(x)
        assert relative(torch.cat([posterior.mean, posterior.logvar], 1), moments) <= 2e-6
        z = latent(ours, (frames - 1) // 4 + 1)
        for execution in (Execution(), Execution(segment=4, recompute=Recompute.INNER)):
            assert relative(ours.decode(z, execution), theirs.decode(z).sample) <= 2e-6


def test_bfloat16_is_no_further_from_float32_than_diffusers(small_kvae):
    """On average over twenty models, within 5 %.

    How much of the rounding cancels out is a matter of chance, which differs between processors and numbers of threads:
    for one model, the ratio of the two errors is between 0.7 and 1.24.
    """
    errors: dict[str, list[float]] = {"encode": [], "their encode": [], "decode": [], "their decode": []}
    for seed in range(20):
        torch.manual_seed(seed)
        ours = KVAE(small_kvae.config).eval().requires_grad_(False)
        theirs = in_diffusers(ours)
        x = torch.rand(1, 3, 9, 32, 48) * 2 - 1
        z = ours.encode(x)
        y = ours.decode(z)
        ours, theirs, x, z_half = (m.bfloat16() for m in (ours, theirs, x, z))
        errors["encode"].append(relative(ours.encode(x), z))
        errors["their encode"].append(relative(theirs.encode(x).latent_dist.mode(), z))
        errors["decode"].append(relative(ours.decode(z_half), y))
        errors["their decode"].append(relative(theirs.decode(z_half).sample, y))
    mean = {name: sum(e) / len(e) for name, e in errors.items()}
    assert mean["encode"] <= 1.05 * mean["their encode"] < 0.05
    assert mean["decode"] <= 1.05 * mean["their decode"] < 0.05


@pytest.mark.parametrize("frames", [21, 37])
def test_a_last_segment_of_one_latent_keeps_its_four_frames(pair, frames):
    """Diffusers drops three of them, so only the segments before are compared with it."""
    ours, theirs = pair
    z = ours.encode(torch.rand(1, 3, frames, 32, 32) * 2 - 1)
    y = ours.decode(z)
    assert y.shape[2] == frames
    before = frames - 4
    torch.testing.assert_close(y[:, :, :before], theirs.decode(z).sample[:, :, :before], rtol=1e-4, atol=1e-5)


def test_samples_have_the_mean_and_deviation_of_the_posterior(small_kvae):
    x = torch.rand(2, 3, 21, 32, 32) * 2 - 1
    posterior = small_kvae.posterior(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 16, 6, 4, 4)
    torch.testing.assert_close(posterior.mean, small_kvae.encode(x))
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(400)])
    torch.testing.assert_close(draws.mean(0), posterior.mean, rtol=0, atol=0.3)
    deviations = (draws.std(0) / (0.5 * posterior.logvar).exp()).mean()
    assert abs(deviations - 1) < 0.02


def test_batch_equals_one_by_one(small_kvae):
    x = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    both = small_kvae.encode(x)
    torch.testing.assert_close(
        both, torch.cat([small_kvae.encode(x[:1]), small_kvae.encode(x[1:])]), rtol=1e-4, atol=1e-5
    )


def test_a_stream_yields_segments(small_kvae):
    z = torch.randn(1, 16, 10, 4, 4)
    assert [frames.shape[2] for frames in small_kvae.decode_stream(z)] == [17, 16, 4]
    x = torch.rand(1, 3, 37, 32, 32)
    assert [posterior.mean.shape[2] for posterior in small_kvae.encode_stream(x)] == [5, 4, 1]


def test_gradients_reach_the_latent(small_kvae):
    z = torch.randn(1, 16, 2, 4, 4, requires_grad=True)
    small_kvae.decode(z).square().sum().backward()
    assert z.grad.abs().min() > 0


def test_wrong_shapes_are_refused(small_kvae):
    with pytest.raises(ValueError, match=r"\[1, 4, 2, 4, 4\]; expected \[B, 16, T, H, W\]"):
        small_kvae.decode(torch.randn(1, 4, 2, 4, 4))
    with pytest.raises(ValueError, match=r"video has shape \[3, 5, 32, 32\]; expected \[B, 3, T, H, W\]"):
        small_kvae.encode(torch.randn(3, 5, 32, 32))
    with pytest.raises(ValueError, match="40 channels does not divide into norm_groups=32"):
        KVAEConfig((40, 80, 160, 320))


@pytest.mark.parametrize(("frames", "padded"), [(1, 1), (2, 5), (5, 5), (6, 9), (33, 33), (34, 37)])
def test_padding_repeats_the_last_frame(frames, padded):
    x = torch.randn(1, 3, frames, 2, 2)
    y = pad_frames(x)
    assert y.shape[2] == padded == padded_frames(frames)
    assert torch.equal(y[:, :, :frames], x)
    assert (y[:, :, frames:] == x[:, :, -1:]).all()
