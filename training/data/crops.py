"""Crops of latents in which a network with a small receptive field computes the same as in the whole clip.

A network reads `radius` latents to each side and 2·radius into the past. Within a crop, its output differs from that
for the whole clip only near those edges of the crop that are not edges of the clip. So a crop is read with a halo, and
the halo does not count in the loss. Time is causal: the halo lies before a crop, never after it.

    # t latent frames, h/w latent rows and columns
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COUNTED = (9, 24, 24)  # largest number of latent frames, rows and columns of a crop without its halo

Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Crop:
    """A part of a clip: the positions to read from [t, h, w], and, relative to these, the positions that count."""

    read: Slices
    counted: Slices


def crop_shape(grid: tuple[int, int, int], radius: int) -> tuple[int, int, int]:
    """[t, h, w] of a crop with its halo, for a clip of this grid."""
    t, h, w = (min(n, c + 2 * radius) for n, c in zip(grid, COUNTED, strict=True))
    return t, h, w


def random_crop(grid: tuple[int, int, int], radius: int, rng: np.random.Generator) -> Crop:
    """A crop at a random place of a clip [t, h, w], for a network of this receptive-field radius."""
    read, counted = [], []
    for axis, (n, size) in enumerate(zip(grid, crop_shape(grid, radius), strict=True)):
        before, after = (2 * radius, 0) if axis == 0 else (radius, radius)
        # drawn beyond the ends and clipped: otherwise positions near a clip's edges would count less often than others
        start = int(np.clip(rng.integers(-before, n - size + after + 1), 0, n - size))
        read.append(slice(start, start + size))
        counted.append(slice(before if start else 0, size - (after if start + size < n else 0)))
    return Crop((read[0], read[1], read[2]), (counted[0], counted[1], counted[2]))


def finer(where: Slices, ratio: int) -> Slices:
    """The same part of a grid with `ratio` rows, and columns, for one."""
    t, h, w = where
    return t, slice(h.start * ratio, h.stop * ratio), slice(w.start * ratio, w.stop * ratio)


def whole_clip(grid: tuple[int, int, int]) -> Crop:
    """The whole clip as a crop, for networks that must see it at once."""
    t, h, w = (slice(0, n) for n in grid)
    return Crop((t, h, w), (t, h, w))


def crop_weights(crops: list[Crop]) -> Tensor:
    """Weight of each position in the loss, float32 [B, 1, t, h, w]: 0 in halos, sum 1 over each crop."""
    t, h, w = (part.stop - part.start for part in crops[0].read)
    out = torch.zeros(len(crops), 1, t, h, w)
    for weight, crop in zip(out, crops, strict=True):
        inside = weight[0][crop.counted]
        inside.fill_(1 / inside.numel())
    return out
