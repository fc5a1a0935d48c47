"""Noise is called noise, in every space, raw and scaled; the latents of a clip are not."""

import pytest
import torch
from torch import Tensor

from conftest import moving_picture
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.serving.inspect import describe
from kvae_comfyui.serving.likely_space import Candidate, candidates
from kvae_comfyui.serving.noise import BLUNT, neighbour_correlation, noise_in
from kvae_comfyui.training.vaes import load_hunyuan_vae, load_kvae_for_training

CANDIDATES = [(channels, each) for channels in (12, 16, 32, 48, 64) for each in candidates(channels)]


def as_of(z: Tensor, candidate: Candidate) -> Tensor:
    """Normalised latents with the statistics of a candidate's channels, or with its level."""
    if not candidate.mean:
        return z * (candidate.level or 1.0)
    mean, std = (torch.tensor(each).view(-1, 1, 1, 1) for each in (candidate.mean, candidate.std))
    return z * std + mean


@pytest.fixture(scope="module", params=["tiny", "tiny-1.5", "tiny-t4s16"])
def of_a_clip(request) -> Tensor:
    """The normalised latents of a clip."""
    load = load_hunyuan_vae if request.param == "tiny-1.5" else load_kvae_for_training
    z = load(request.param, "cpu").encode(moving_picture(9, 128, 192)[None])
    var, mean = torch.var_mean(z, (0, 2, 3, 4), keepdim=True)
    return (z - mean) / var.sqrt()


@pytest.mark.parametrize(("channels", "candidate"), CANDIDATES, ids=str)
def test_noise_is_told_in_every_space_raw_and_scaled(channels, candidate):
    z = as_of(torch.randn(1, channels, 2, 24, 40), candidate)
    for each in (z, z[:, :, 0]):  # of a video, and of an image
        assert "this is noise" in describe(each) and "likely" not in describe(each)


@pytest.mark.parametrize("space", SPACES.values(), ids=lambda space: space.name)
def test_noise_is_told_of_a_space_that_is_known(space):
    report = describe(torch.randn(1, space.channels, 5, 12, 20), space.name)
    assert f"Space: {space.name} (known" in report and "this is noise" in report


def test_the_latents_of_a_clip_are_no_noise_until_a_sampler_adds_much(of_a_clip):
    noise = torch.randn_like(of_a_clip)
    assert noise_in(of_a_clip) is None and noise_in(0.6 * of_a_clip + 0.4 * noise) is None
    assert "mostly noise" in noise_in(0.35 * of_a_clip + 0.65 * noise)
    assert "this is noise" in noise_in(0.1 * of_a_clip + 0.9 * noise)


def test_the_correlation_is_the_root_mean_square_over_directions_and_channels():
    """Sums, and differences, of two neighbours in a row correlate by 1/2, and -1/2, in rows, and not otherwise."""
    z = torch.randn(2, 16, 40, 40, 41)
    sign = torch.tensor([1.0, -1.0]).repeat(8).view(-1, 1, 1, 1)
    z = (z[..., 1:] + sign * z[..., :-1]) * torch.linspace(0.1, 9, 16).view(-1, 1, 1, 1) + 5
    assert neighbour_correlation(z)[0] == pytest.approx(0.5 / 3**0.5, abs=0.002)
    assert neighbour_correlation(z[:, :, 0])[0] == pytest.approx(0.5 / 2**0.5, abs=0.02)


def test_noise_is_within_what_chance_may_add_and_half_of_it_has_no_correlation():
    found = [neighbour_correlation(torch.randn(1, 16, 3, 8, 12)) for _ in range(1000)]
    assert all(correlation <= chance for correlation, chance in found)
    assert 400 < sum(correlation == 0 for correlation, _ in found) < 650


def test_too_few_values_and_values_without_a_correlation_are_not_judged():
    few = torch.randn(1, 16, 1, 8, 12)
    assert neighbour_correlation(few)[1] > BLUNT and noise_in(few) is None
    bad = torch.randn(1, 16, 5, 12, 20)
    bad[0, 3] = 1.0
    nothing = torch.randn(1, 8, 2000), torch.zeros(1, 16, 0, 4, 4), torch.randn(4, 16, 1, 1, 1)
    for z in (bad, torch.full_like(bad, torch.nan), *nothing):
        assert neighbour_correlation(z) is None and noise_in(z) is None
