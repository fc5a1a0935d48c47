"""What the statistics of a latent's channels say about its space, where its shape says nothing.

A single clip differs much from the average of its space, and a false alarm is worse than none. Only what no clip of the
expected space can be expected to show counts as certain; each limit below says why.

# z_Bcthw latents; statistics are over B, t, h and w
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from ..adapters.spaces import LatentSpace
from .published_statistics import WAN_21

logger = logging.getLogger(__name__)

# Two unrelated lists of 16 numbers correlate by more than this in one of 10,000 cases; here both lists must.
CERTAIN_CORRELATION = 0.8
# A sampler's latents have mean 0 and deviation 1 by design. A raw latent of little contrast may have a small deviation
# in all, but its channels then differ: it does not have these values in every one.
NORMAL_MEAN, NORMAL_STD = 0.5, (0.7, 1.4)
WAN, SCALED, UNSCALED_TWICE = "Wan 2.1's", "scaled", "unscaled twice"
TOO_LARGE = 1.9  # times the deviation of the space: raw latents of HunyuanVideo that are unscaled again have 2.1 times


def channel_statistics(z_Bcthw: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each channel, [c] each, float32 on the CPU."""
    var, mean = torch.var_mean(z_Bcthw.float(), dim=(0, 2, 3, 4), correction=0)
    return mean.cpu(), var.sqrt().cpu()


def _like_wan(mean: Tensor, std: Tensor) -> tuple[float, float]:
    """How much the channel means, and the logarithms of the deviations, are like Wan 2.1's: 1 is entirely.

    0, 0 for latents of other than 16 channels, and if a channel does not vary.
    """
    if len(mean) != WAN_21.channels or not std.min() > 0:
        return 0.0, 0.0
    return _correlation(mean, torch.tensor(WAN_21.mean)), _correlation(std.log(), torch.tensor(WAN_21.std).log())


def certain_fault(z_Bcthw: Tensor, space: LatentSpace) -> str | None:
    """Why these are clearly no raw latents of `space`, as one line, or None if that is not certain."""
    if z_Bcthw.is_meta:
        return None
    kind, whole = wrong_kind(z_Bcthw, space)
    if kind == WAN:
        return (
            f"The channels of this latent have the means and deviations of Wan 2.1, not of {space.name}: "
            "the frames will be wrong. Decode it with Wan's VAE."
        )
    if kind == SCALED:
        return (
            f"This latent looks scaled: its standard deviation is {whole:.2f}, that of raw {space.name} latents about "
            f"{space.raw_deviation:.2f}. If the colours are flat, choose scaled, in KVAE Decode or with --scaling."
        )
    if kind == UNSCALED_TWICE:
        return (
            f"This latent has a standard deviation of {whole:.2f}, raw {space.name} latents have about "
            f"{space.raw_deviation:.2f}. If the colours are burnt, choose raw, in KVAE Decode or with --scaling."
        )
    return None


def wrong_kind(z_Bcthw: Tensor, space: LatentSpace) -> tuple[str | None, float]:
    """What these latents clearly are instead of raw ones of `space`, or None; and their standard deviation in all."""
    mean, std = channel_statistics(z_Bcthw)
    whole = (std.square().mean() + mean.var(correction=0)).sqrt().item()
    if min(_like_wan(mean, std)) > CERTAIN_CORRELATION:
        return WAN, whole
    raw, (low, high) = space.raw_deviation, NORMAL_STD
    if raw and mean.abs().max() < NORMAL_MEAN and low < std.min() and std.max() < high:
        return SCALED, whole
    return UNSCALED_TWICE if raw and whole > TOO_LARGE * raw else None, whole


def warn_of_faults(z_Bcthw: Tensor, space: LatentSpace) -> None:
    """Log the certain fault of a latent that is to be decoded, once for each latent."""
    if fault := certain_fault(z_Bcthw, space):
        _say(fault)


@lru_cache(maxsize=1)  # a decode that falls back to tiles checks the same latent again
def _say(fault: str) -> None:
    logger.warning(fault)


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
