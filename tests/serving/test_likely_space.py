"""Which space a latent is likely of: Bayes' rule on its channels' statistics, as a report that never decides."""

import inspect
import math
import re

import diffusers
import pytest
import torch
from torch.distributions import Normal

from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.serving import likely_space
from kvae_comfyui.serving.inspect import LIKELY, describe
from kvae_comfyui.serving.likely_space import candidates, likely, state_within
from kvae_comfyui.serving.published_statistics import PUBLISHED, WAN_21

HUNYUAN = SPACES["hunyuan_video"]


def latents(mean, std, channels=16, size=(1, 5, 12, 20), seed=0):
    """Smooth latents whose channels have exactly these means and deviations."""
    b, t, h, w = size
    z = torch.randn(b, channels, t, h + 1, w + 1, generator=torch.Generator().manual_seed(seed))
    z = torch.nn.functional.avg_pool3d(z, (1, 2, 2), 1)
    std_C, mean_C = (torch.as_tensor(each).expand(channels).view(1, -1, 1, 1, 1) for each in (std, mean))
    var, middle = torch.var_mean(z, (0, 2, 3, 4), correction=0, keepdim=True)
    return (z - middle) / var.sqrt() * std_C + mean_C


def named(ranked):
    return [str(each) for each, _ in ranked]


@pytest.mark.parametrize(
    ("name", "model"),
    [("Wan 2.1", "AutoencoderKLWan"), ("Mochi", "AutoencoderKLMochi"), ("Qwen-Image 2", "AutoencoderKLQwenImage21"),
     ("Cosmos 1", "AutoencoderKLCosmos")],
)  # fmt: skip
def test_published_statistics_are_those_of_diffusers(name, model):
    if not hasattr(diffusers, model):
        pytest.skip(f"needs a diffusers with {model}")
    (ours,) = [each for each in PUBLISHED if each.name == name]
    fields = inspect.signature(getattr(diffusers, model).__init__).parameters
    for found, field in ((ours.mean, "latents_mean"), (ours.std, "latents_std")):
        theirs = torch.tensor(fields[field].default).view(ours.channels, -1).mean(1)  # Cosmos: of 16 latent frames
        torch.testing.assert_close(torch.tensor(found), theirs, rtol=0, atol=6e-5)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda each: each.name)
def test_the_average_of_a_published_space_is_likely_that_space_raw_and_scaled(published):
    z = latents(published.mean, published.std, published.channels)
    assert named(likely(z))[0] == f"raw {published.name}"
    scaled = latents(0.0, 1.0, published.channels)
    assert re.fullmatch(f"scaled .*{published.name}.*", named(likely(scaled))[0])


def test_the_same_values_in_other_channels_are_not_wan():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(each)[order] for each in (WAN_21.mean, WAN_21.std))
    assert likely(latents(WAN_21.mean, WAN_21.std))[0][1] > 0.9
    assert {str(each): p for each, p in likely(latents(mean, std))}["raw Wan 2.1"] < 0.1


def test_raw_and_scaled_latents_of_hunyuan_are_told_by_their_level():
    mean = torch.linspace(-1, 1, 16)
    raw = latents(mean, 2.0)
    assert named(likely(raw))[0] == "raw hunyuan_video"
    for z, expected in ((raw, "raw"), (HUNYUAN.scale(raw), "scaled")):
        state, odds = state_within(likely(z), HUNYUAN)
        assert state == expected and odds > 0.95
    halfway = raw / raw.square().mean().sqrt() * math.exp(0.5 * math.log(HUNYUAN.raw_deviation) + likely_space.LEVEL[0])
    assert state_within(likely(halfway), HUNYUAN)[1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("channels", [16, 12, 32, 64])
def test_the_odds_are_those_of_bayes_rule(channels):
    """Written again with torch.distributions, one candidate and one channel at a time."""
    z = latents(0.3 * torch.randn(channels), 1.5 * (0.3 * torch.randn(channels)).exp(), channels)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4), correction=0)
    noise = likely_space.CORRELATED / (5 * 12 * 20)
    level = math.log(z.square().mean().sqrt())
    logs = {}
    for each in candidates(channels):
        middle, spread = likely_space.LEVEL
        at, var = (likely_space.ANY_LEVEL[0], likely_space.ANY_LEVEL[1] ** 2) if each.level is None else (
            math.log(each.level), 0.0)  # fmt: skip
        log = Normal(middle + at, math.sqrt(spread**2 + var + noise / channels)).log_prob(torch.tensor(level))
        known = bool(each.mean)
        scale = torch.tensor(each.std) if known else torch.full((channels,), math.exp(level))
        center = torch.tensor(each.mean) if known else torch.zeros(channels)
        unlike = (0.0, 0.0) if known else (likely_space.UNLIKE_MEAN, likely_space.UNLIKE_STD)
        changes = (std / scale).log()
        for c in range(channels):
            shift = math.sqrt(likely_space.SHIFT**2 + unlike[0] ** 2 + noise)
            change = math.sqrt(likely_space.CHANGE**2 + unlike[1] ** 2 + noise / 2)
            of_mean = Normal(center[c], shift * scale[c]).log_prob(mean[c])
            of_std = Normal(0, change).log_prob(changes[c] - changes.mean())
            log = log + likely_space.INDEPENDENT / channels * (of_mean + of_std)
        logs[str(each)] = log.item()
    total = sum(math.exp(log) for log in logs.values())
    ranked = likely(z)
    assert [p for _, p in ranked] == sorted((p for _, p in ranked), reverse=True)
    assert {str(each): p for each, p in ranked} == pytest.approx(
        {name: math.exp(log) / total for name, log in logs.items()}, rel=1e-3
    )


def test_nothing_is_guessed_of_what_has_no_statistics_or_no_candidates():
    for z in (torch.zeros(1, 16, 2, 4, 4), torch.randn(1, 16, 1, 1, 1), torch.full((1, 16, 2, 4, 4), torch.nan),
              torch.randn(1, 7, 2, 4, 4)):  # fmt: skip
        assert likely(z) == []
        assert "likely" not in describe(z) and "do not tell" not in describe(z)
    assert "likely" not in describe(torch.randn(1, 16, 8, 8))  # an image


def test_the_report_states_a_guess_with_its_odds_and_what_would_settle_it():
    report = describe(latents(WAN_21.mean, WAN_21.std))
    odds = re.search(r"it is likely raw Wan 2.1, (\d+) %\.\n", report)
    assert odds and 100 * LIKELY <= int(odds[1]) <= 99
    assert report.endswith("to settle it, decode a few frames with the VAE of each.")


def test_the_report_says_so_if_the_channels_do_not_tell():
    """A deviation between raw HunyuanVideo and anything: nothing is published that would tell KVAE from it."""
    report = describe(latents(torch.linspace(-1, 1, 16), 1.5))
    (line,) = re.findall(r"The means and deviations of its channels do not tell which: .*", report)
    assert "raw hunyuan_video" in line and "kvae_3d_1.0 or kvae_3d_2.0_t4s8 or another VAE" in line


def test_a_latent_that_names_its_space_and_vae_is_not_guessed():
    report = describe(latents(WAN_21.mean, WAN_21.std), "hunyuan_video", weights=VAEWeights("0123456789abcdef"))
    assert "Wan" not in report and "likely" not in report and "%" not in report
    assert report.endswith("It is of the hunyuan_video VAE with sha256 0123456789ab….")
