"""Whether a latent is noise: neighbouring values of a picture's latent correlate, those of noise do not.

`benchmarks.which` measures both, and how often the verdict is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEVIATIONS = 5  # more than chance does
MOSTLY = 0.2  # correlation below which noise outweighs the picture; finished latents of whole clips have 0.4 or more
BLUNT = 0.1  # if chance alone may show this much, there are too few values for a verdict


def neighbour_correlation(z: Tensor) -> tuple[float, float] | None:
    """How much values correlate with their neighbours in time, in columns and in rows, and how much by chance.

    Both are root mean squares over channels and directions, since fine texture makes some of them negative. A channel's
    mean and deviation do not count, so that raw and scaled latents give the same.

    Args:
        z: latents [B, c, t, h, w], or of images [B, c, h, w], any float dtype.

    Returns:
        The correlation, 0..1, without what chance adds on average; and what it may add at most, in normal noise. None
        for other dimensions, without neighbours, if a channel does not vary, or holds values that are not finite.
    """
    if z.ndim not in (4, 5) or not z.numel():
        return None
    axes = [axis for axis in range(2, z.ndim) if z.shape[axis] > 1]
    places = (0, *range(2, z.ndim))
    var, mean = torch.var_mean(z.float(), places, correction=0, keepdim=True)
    if not axes or not ((var > 0) & var.isfinite()).all():
        return None
    values, squares, pairs = (z - mean) / var.sqrt(), 0.0, 0
    for axis in axes:
        n = z.shape[axis] - 1
        products = values.narrow(axis, 0, n) * values.narrow(axis, 1, n)
        squares += products.mean(places).square().sum().item() * (products.numel() // len(var.flatten()))
        pairs += products.numel()
    freedom = len(axes) * z.shape[1]  # of noise, `squares` is a chi-squared variable
    return math.sqrt(max(squares - freedom, 0) / pairs), math.sqrt(DEVIATIONS * math.sqrt(2 * freedom) / pairs)


def noise_in(z: Tensor) -> str | None:
    """What `neighbour_correlation` says of noise, as a sentence; None if it is a picture's latent, or unknown."""
    correlation, chance = neighbour_correlation(z) or (1.0, 1.0)
    if chance > BLUNT or correlation > max(chance, MOSTLY):
        return None
    if correlation <= chance:
        return (
            "Neighbouring values do not correlate: this is noise, which a sampler starts from, and alike in all spaces."
        )
    return (
        f"Neighbouring values correlate by only {correlation:.2f}: this is mostly noise, as in a sampler's first steps."
    )
