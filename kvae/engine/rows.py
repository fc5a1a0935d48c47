"""Feature maps that are asked for by rows: held in memory here, or computed on demand from others elsewhere.

# B batch, C channels, T frames, H/W rows and columns, lo:hi rows
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

MIN_ROWS = 2  # so that the strip before is all that the next one's window can reach


class Rows(Protocol):
    """A feature map that is asked for by rows."""

    shape: torch.Size  # [B, C, T, H, W]
    row_bytes: int  # in use while one row is computed

    def __call__(self, lo: int, hi: int) -> Tensor:
        """[B, C, T, hi − lo, W]."""

    def tail(self, frames: int) -> Rows:
        """The last frames alone, for the next segment."""


class Held:
    """A feature map in memory.

    Args:
        reach: the most frames that a tail of it has, where tails are to be in memory of their own.
    """

    def __init__(self, x_BCTHW: Tensor, reach: int | None = None):
        self.x, self.shape, self.row_bytes, self.reach = x_BCTHW, x_BCTHW.shape, 0, reach
        self.last: Tensor | None = None

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.x[:, :, :, lo:hi]

    def tail(self, frames: int) -> Held:
        """In the same memory, or in one that all tails share."""
        if self.reach is None:
            return Held(self.x[:, :, -frames:])
        if self.last is None:
            self.last = self.x[:, :, -self.reach :].clone()
        return Held(self.last[:, :, -frames:])


def even_strips(height: int, most: int) -> Iterator[tuple[int, int]]:
    """Bounds of the fewest strips of nearly equal height, at most `most` rows each where MIN_ROWS allows."""
    count = _strips(height, most)
    bounds = [height * i // count for i in range(count + 1)]
    yield from pairwise(bounds)


def largest_strip(height: int, most: int) -> int:
    """Rows of the highest of them."""
    return -(-height // _strips(height, most))


def _strips(height: int, most: int) -> int:
    count = -(-height // max(MIN_ROWS, most))
    return max(1, min(count, height // MIN_ROWS))
