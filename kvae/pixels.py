"""Pixel conventions: how 0..255 becomes the −1..1 of a VAE, and back.

KVAE was trained on x/128 − 1 (checkpoint config data.input_norm "m11"), HunyuanVideo on x/127.5 − 1. Mixing the two is
a colour shift that caps PSNR, so each VAE names its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

KVAE_HALF_RANGE = 128.0
HUNYUAN_HALF_RANGE = 127.5


def to_unit(x_uint8: Tensor, half_range: float) -> Tensor:
    """0..255 (uint8) → −1..1 (float32): x / half_range − 1."""
    return x_uint8.float() / half_range - 1


def from_unit(x_unit: Tensor, half_range: float) -> Tensor:
    """−1..1 (any float) → 0..255 (float32), clipped, not rounded: the inverse of `to_unit`."""
    return ((x_unit.float() + 1) * half_range).clamp(0, 255)


def to_uint8(x_unit: Tensor, half_range: float) -> Tensor:
    """−1..1 (any float) → 0..255 (uint8), rounded and clipped."""
    return from_unit(x_unit, half_range).round().to(torch.uint8)


def kvae_from_hunyuan(x: Tensor) -> Tensor:
    """Pixels in HunyuanVideo's −1..1 → in KVAE's: the same colours, 255 at 127/128."""
    return (x + 1) * (HUNYUAN_HALF_RANGE / KVAE_HALF_RANGE) - 1


def hunyuan_from_kvae(x: Tensor) -> Tensor:
    """Pixels in KVAE's −1..1 → in HunyuanVideo's: the same colours, 127/128 at 1."""
    return (x + 1) * (KVAE_HALF_RANGE / HUNYUAN_HALF_RANGE) - 1
