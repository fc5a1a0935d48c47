"""What counts as certain: a latent is called another space's only if no clip of its own can be expected to look so."""

import logging

import pytest
import torch

from kvae_comfyui.adapters import latent_space
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.inspect import describe
from kvae_comfyui.serving.latent_statistics import certain_fault
from kvae_comfyui.serving.published_statistics import WAN_21

WAN_MEAN, WAN_STD = WAN_21.mean, WAN_21.std
HUNYUAN, NATIVE = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")
SHAPE = (1, 16, 5, 12, 20)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def smooth(z: torch.Tensor) -> torch.Tensor:
    """Latents of the same statistics in which neighbours are alike, as in those of a picture."""
    return z.sort(dim=-1).values


def latents(mean, std, seed: int = 0) -> torch.Tensor:
    """Random latents whose channels have these means and deviations."""
    mean, std = (torch.as_tensor(each).expand(16).view(1, 16, 1, 1, 1) for each in (mean, std))
    return noise(seed) * std + mean


def of_a_clip(mean, std, spread: float, seed: int) -> torch.Tensor:
    """A clip that differs from the average: each channel by `spread` deviations, and its deviation by that factor."""
    g = torch.Generator().manual_seed(1000 + seed)
    mean, std = (torch.as_tensor(each).expand(16) for each in (mean, std))
    factors = (spread * torch.randn(16, generator=g)).exp()
    return latents(mean + spread * std * torch.randn(16, generator=g), std * factors, seed)


def any_space(seed: int) -> torch.Tensor:
    """A clip of a space of unknown statistics, with deviations as unlike as Wan's and about HunyuanVideo's in all."""
    g = torch.Generator().manual_seed(seed)
    return latents(torch.randn(16, generator=g), 2 * (0.35 * torch.randn(16, generator=g)).exp(), seed)


@pytest.mark.parametrize("space", [HUNYUAN, NATIVE], ids=lambda space: space.name)
def test_the_means_and_deviations_of_wan_are_certain(space):
    assert "Wan 2.1" in certain_fault(latents(WAN_MEAN, WAN_STD), space)
    assert "Wan 2.1" in certain_fault(0.6 * latents(WAN_MEAN, WAN_STD), space)  # a clip of little contrast


def test_most_clips_near_the_average_of_wan_are_found():
    found = [certain_fault(of_a_clip(WAN_MEAN, WAN_STD, 0.15, seed), HUNYUAN) for seed in range(50)]
    assert sum(bool(each and "Wan 2.1" in each) for each in found) > 25


def test_the_means_or_the_deviations_alone_are_not_certain():
    assert certain_fault(latents(WAN_MEAN, 2.1), HUNYUAN) is None
    assert certain_fault(latents(0.0, WAN_STD), HUNYUAN) is None


def test_channels_that_are_all_normalised_are_certain_to_be_scaled():
    assert "looks scaled" in certain_fault(latents(0.0, 1.0), HUNYUAN)
    assert certain_fault(latents(0.0, 1.0), NATIVE) is None  # no deviation is published for it


def test_a_small_deviation_alone_is_not_certain():
    """A raw latent of a dark or flat clip: its channels differ in mean, or some hardly vary."""
    mean = torch.linspace(-1, 1, 16)
    assert certain_fault(latents(mean, 0.8), HUNYUAN) is None
    assert certain_fault(latents(0.0, torch.linspace(0.4, 1.6, 16)), HUNYUAN) is None
    assert certain_fault(latents(mean, 0.05), HUNYUAN) is None


def test_twice_unscaled_latents_are_certain():
    raw = HUNYUAN.unscale(noise())
    assert certain_fault(raw, HUNYUAN) is None
    assert "choose raw" in certain_fault(HUNYUAN.unscale(raw), HUNYUAN)


def test_no_false_alarm_in_500_clips_of_unknown_statistics():
    assert [certain_fault(any_space(seed), HUNYUAN) for seed in range(500)] == [None] * 500
    assert [certain_fault(any_space(seed), NATIVE) for seed in range(500)] == [None] * 500


@pytest.mark.parametrize("z", [torch.zeros(SHAPE), torch.randn(1, 16, 1, 1, 1), torch.zeros(SHAPE, device="meta")])
def test_nothing_is_said_of_a_latent_without_statistics(z):
    assert certain_fault(z, HUNYUAN) is None


def test_other_shapes_are_not_compared_with_wan():
    assert certain_fault(torch.randn(1, 64, 3, 4, 4), latent_space("kvae_3d_2.0_t4s16")) is None
    assert certain_fault(torch.randn(1, 32, 3, 4, 4), latent_space("hunyuan_video_1.5")) is None


def test_a_decode_warns_once_and_decodes_all_the_same(small_kvae, caplog):
    host, wan = HostVAE(small_kvae), latents(WAN_MEAN, WAN_STD)[..., :4, :4]
    with caplog.at_level(logging.WARNING):
        host.decode(wan)
        host.decode_tiled(wan)
    (record,) = caplog.records
    assert "\n" not in record.getMessage() and "Wan 2.1" in record.getMessage()


def test_the_report_names_all_spaces_of_the_shape_and_compares_with_wan():
    report = describe(smooth(latents(WAN_MEAN, WAN_STD)))
    for name in ("hunyuan_video", "kvae_3d_1.0", "kvae_3d_2.0_t4s8", "Wan 2.1", "CogVideoX", "Cosmos"):
        assert name in report.splitlines()[0]
    assert "it is likely raw Wan 2.1" in report
    assert "likely raw Wan" not in describe(HUNYUAN.unscale(smooth(noise())))
