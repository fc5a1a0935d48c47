"""Errors by spatial frequency: which detail is lost?

A frame is a sum of cosines, cos(π k (n + ½) / N) over its rows and columns (the discrete cosine transform). Unlike a
Fourier transform, it does not take the step between opposite edges for fine detail. The frequency of a cosine is
k / 2N cycles for each latent or pixel; those of rows and columns together make a radius.

# H/W rows and columns of latents or pixels
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

BINS = 8  # of equal width up to half a cycle; the last one also has the corners, which are finer
EMPTY = 1e-12  # share of the target's power below which a bin counts as empty


class Spectrum:
    """The power of errors and of their targets by frequency, over clips."""

    def __init__(self) -> None:
        self.error = self.target = torch.zeros(BINS).double()

    def add(self, error: Tensor, target: Tensor) -> None:
        """Add a clip, [..., T, H, W] each. The target counts around the mean of each channel."""
        self.error = self.error + _power(error)
        self.target = self.target + _power(target - target.mean((-3, -2, -1), keepdim=True))

    def shares(self) -> list[float | None]:
        """The squared error divided by the target's power, by bin; None where the target has none."""
        least = EMPTY * self.target.sum().item()
        pairs = zip(self.error.tolist(), self.target.tolist(), strict=True)
        return [error / target if target > least else None for error, target in pairs]


def frequencies() -> list[float]:
    """The middle of each bin, in cycles for each latent or pixel."""
    return [(n + 0.5) / (2 * BINS) for n in range(BINS)]


def _power(x: Tensor) -> Tensor:
    """[..., H, W] → [BINS], the sum of squares by frequency."""
    x = x.cpu().float()
    H, W = x.shape[-2:]
    power = (_cosines(H) @ x @ _cosines(W).T).double().square().sum(tuple(range(x.ndim - 2)))
    return torch.zeros(BINS).double().index_add_(0, _bins(H, W).flatten(), power.flatten())


@lru_cache(maxsize=8)
def _cosines(n: int) -> Tensor:
    """The orthonormal transform of n values, [n, n]: row k is the cosine of k half-cycles."""
    k, at = torch.arange(n).double()[:, None], torch.arange(n).double() + 0.5
    rows = torch.cos(math.pi / n * k * at) * math.sqrt(2 / n)
    rows[0] = math.sqrt(1 / n)
    return rows.float()


@lru_cache(maxsize=8)
def _bins(H: int, W: int) -> Tensor:
    """The bin of every row and column of a transformed frame, [H, W]."""
    rows, columns = (torch.arange(n).double() / (2 * n) for n in (H, W))
    radius = torch.hypot(rows[:, None], columns[None])
    return (radius * 2 * BINS).long().clamp(max=BINS - 1)
