"""Pixel conventions: how 0..255 becomes the −1..1 of a VAE, and back.

KVAE was trained on x/128 − 1 (data.input_norm "m11" in the checkpoint's config; utils/saving_reconstruction_utils.py of
https://github.com/kandinskylab/kvae has the formula), HunyuanVideo on x/127.5 − 1. Mixing the two shifts the colours,
which limits PSNR, so each VAE names its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

KVAE_HALF_RANGE = 128.0
HUNYUAN_HALF_RANGE = 127.5


def to_unit(x_uint8: Tensor, half_range: float) -> Tensor:
    """Convert 0..255 (uint8) to −1..1 (float32): x / half_range − 1."""
    return x_uint8.float() / half_range - 1


def from_unit(x_unit: Tensor, half_range: float) -> Tensor:
    """Convert −1..1 (any float) to 0..255 (float32), clipped but not rounded: the inverse of `to_unit`."""
    return ((x_unit.float() + 1) * half_range).clamp(0, 255)


def to_uint8(x_unit: Tensor, half_range: float) -> Tensor:
    """Convert −1..1 (any float) to 0..255 (uint8), rounded and clipped."""
    return from_unit(x_unit, half_range).round().to(torch.uint8)


def kvae_from_hunyuan(x: Tensor) -> Tensor:
    """Convert pixels in HunyuanVideo's −1..1 to KVAE's: the same colours, with 255 at 127/128."""
    return (x + 1) * (HUNYUAN_HALF_RANGE / KVAE_HALF_RANGE) - 1


def hunyuan_from_kvae(x: Tensor) -> Tensor:
    """Convert pixels in KVAE's −1..1 to HunyuanVideo's: the same colours, with 127/128 at 1."""
    return (x + 1) * (KVAE_HALF_RANGE / HUNYUAN_HALF_RANGE) - 1
