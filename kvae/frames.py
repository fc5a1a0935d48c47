"""Frame counts: a causal VAE takes 4n + 1 frames; any other clip repeats its last frame and is cut again."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_frames(frames: int, cadence: int = 4) -> int:
    """The next cadence·n + 1."""
    return frames + (1 - frames) % cadence


def pad_frames(x_BCTHW: Tensor, cadence: int = 4) -> Tensor:
    """Repeat the last frame up to the next cadence·n + 1 frames."""
    missing = padded_frames(x_BCTHW.shape[2], cadence) - x_BCTHW.shape[2]
    if not missing:
        return x_BCTHW
    return torch.cat([x_BCTHW, x_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
