"""Feature maps that are read by rows: held in memory here, or computed on demand (`.lazy_maps`).

Each map says how many bytes it needs, so that a run can be added up beforehand (`.count`).

# B batch, C channels, T frames, H/W rows and columns, lo:hi rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

ReadRows = Callable[[int, int], Tensor]  # (lo, hi) → [B, C, T, hi − lo, W]


class Rows(Protocol):
    """Something that is read by rows, and the memory that this takes."""

    def __call__(self, lo: int, hi: int) -> Tensor:
        """[B, C, T, hi − lo, W]."""

    def peak_bytes(self, rows: int) -> int:
        """The most bytes in use while `rows` rows are computed, including these rows; 0 if they are in memory."""


class FeatureMap(Rows, Protocol):
    """A feature map that is read by rows."""

    shape: torch.Size  # [B, C, T, H, W]
    row_bytes: int  # memory in use while one row is computed: it determines the height of strips

    def result_bytes(self, rows: int) -> int:
        """Bytes of `rows` computed rows; 0 if they are in memory."""

    def last_frames(self, frames: int) -> FeatureMap:
        """The last frames alone, for the next segment to read."""


class Materialized:
    """A feature map in memory.

    Args:
        copied_frames: the most frames that `last_frames` is asked for, if they must outlive the map: they are then
            copied. None: they are views of the map.
    """

    row_bytes = 0

    def __init__(self, x_BCTHW: Tensor, copied_frames: int | None = None):
        self.x, self.shape, self.copied_frames = x_BCTHW, x_BCTHW.shape, copied_frames
        self._copy: Tensor | None = None

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.x[:, :, :, lo:hi]

    def peak_bytes(self, rows: int) -> int:
        return 0

    def result_bytes(self, rows: int) -> int:
        return 0

    def last_frames(self, frames: int) -> Materialized:
        """The last frames alone, as views of the map, or of one copy that all calls share."""
        if self.copied_frames is None:
            return Materialized(self.x[:, :, -frames:])
        if self._copy is None:
            self._copy = self.x[:, :, -self.copied_frames :].clone()
        return Materialized(self._copy[:, :, -frames:])
