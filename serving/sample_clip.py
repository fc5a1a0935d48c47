"""A built-in test clip with what video VAEs find hard: motion, edges, fine stripes and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import room_for


def sample_clip(frames: int, height: int, width: int) -> Tensor:
    """[T, H, W, 3] in 0..1: a colour gradient that drifts, a disc that crosses it, fine stripes and a grey ramp.

    Raises:
        MemoryError: there is no memory for the frames.
    """
    room_for((frames, height, width, 3), "cpu", f"frames, {frames} of {width}x{height}: make fewer or smaller ones")
    t = torch.linspace(0, 1, frames)[:, None, None]
    y = torch.linspace(0, 1, height)[None, :, None]
    x = torch.linspace(0, 1, width)[None, None, :]
    phase = 2 * torch.pi * torch.stack(torch.broadcast_tensors(x + t / 2, y - t / 3, (x + y) / 2 + t), dim=-1)
    clip = 0.5 + 0.3 * torch.sin(phase)
    aspect = width / height
    disc = ((x - 0.2 - 0.6 * t) * aspect) ** 2 + (y - 0.45) ** 2 < 0.15**2
    clip[disc] = torch.tensor([0.9, 0.35, 0.1])
    stripes = (torch.arange(width) // 2 % 2).float()
    clip[:, int(height * 0.75) : int(height * 0.88)] = stripes[None, None, :, None]
    clip[:, int(height * 0.88) :] = torch.linspace(0, 1, width)[None, None, :, None]
    return clip
