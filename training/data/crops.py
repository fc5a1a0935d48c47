"""Crops of latents that a network of limited sight cannot tell from the whole clip.

A network that reads `radius` latents to each side, and 2·radius into the past, gives inside a crop what it gives for
the whole clip, but for the positions near edges that are not the clip's own. So a crop is read with a halo, and the
halo does not count. Time is causal: the halo is before a crop, never after it.

    # t latent frames, h/w latent rows and columns
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COUNTED = (9, 24, 24)  # latent frames, rows, columns of a crop, without its halo

Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Crop:
    """A part of a clip: which positions to read of [t, h, w], and which of those read count."""

    read: Slices
    counted: Slices


def crop_shape(grid: tuple[int, int, int], radius: int) -> tuple[int, int, int]:
    """[t, h, w] of what a crop of such a clip reads."""
    t, h, w = (min(n, c + 2 * radius) for n, c in zip(grid, COUNTED, strict=True))
    return t, h, w


def random_crop(grid: tuple[int, int, int], radius: int, rng: np.random.Generator) -> Crop:
    """A crop at a random place of a clip [t, h, w], for a network of this radius."""
    read, counted = [], []
    for axis, (n, size) in enumerate(zip(grid, crop_shape(grid, radius), strict=True)):
        before, after = (2 * radius, 0) if axis == 0 else (radius, radius)
        # beyond the ends and back: else the edges of clips, which need no halo, would count less often than the rest
        start = int(np.clip(rng.integers(-before, n - size + after + 1), 0, n - size))
        read.append(slice(start, start + size))
        counted.append(slice(before if start else 0, size - (after if start + size < n else 0)))
    return Crop((read[0], read[1], read[2]), (counted[0], counted[1], counted[2]))


def whole_clip(grid: tuple[int, int, int]) -> Crop:
    """All of a clip, for networks that must see it at once."""
    t, h, w = (slice(0, n) for n in grid)
    return Crop((t, h, w), (t, h, w))


def crop_weights(crops: list[Crop]) -> Tensor:
    """float32 [B, 1, t, h, w]: what each position read counts for, 0 in halos, sum 1 over each crop."""
    t, h, w = (part.stop - part.start for part in crops[0].read)
    out = torch.zeros(len(crops), 1, t, h, w)
    for weight, crop in zip(out, crops, strict=True):
        inside = weight[0][crop.counted]
        inside.fill_(1 / inside.numel())
    return out
