"""Recognise a model's weights by a few of their values, even after a conversion to bfloat16 or to other key names.

The hash of a file only tells whether two files are the same. A signature holds one value of each of up to 64 tensors,
at positions that depend only on the tensors' names and shapes. If weights were trained separately, or further, nearly
all of these values differ; rounding changes each by a few thousandths of itself.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MOST = 64  # values in a signature
ROUNDING = 1 / 16  # relative change that a conversion may cause; bfloat16 rounds by at most 1/512
AGREEING = 0.9  # fraction of the values that must agree
# Of weights that were trained separately 2 % agree by chance, and never more than 10 % in 10,000 random signatures. If
# only the decoder differs, the encoder's quarter of a KVAE's signature agrees; if only the encoder does, the rest.
UNRELATED = 0.18


def signature(tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """The signature of a state dict with official names; empty on the meta device, where there are no values."""
    matrices = [key for key in sorted(tensors) if _is_matrix(tensors[key])]
    if any(tensors[key].is_meta for key in matrices):
        return ()
    chosen = [matrices[i * len(matrices) // MOST] for i in range(MOST)] if len(matrices) > MOST else matrices
    return tuple(_value(key, tensors[key]) for key in chosen)


def same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two signatures are of the same weights, except for rounding. An empty one matches every other."""
    return not one or not other or _agreement(one, other) >= AGREEING


def unrelated_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two signatures have neither encoder nor decoder in common, so that neither VAE reads the other's latents.

    False if one half was trained further, which a signature does not tell apart. With the same encoder, the latents are
    the same. With the same decoder and another encoder they are not: the decoder reads them as well as that encoder was
    trained for it. Adapters are made for one encoder's latents; `same_weights` tells them that it is another. False if
    one is empty.
    """
    return bool(one and other) and _agreement(one, other) < UNRELATED


def _agreement(one: Sequence[float], other: Sequence[float]) -> float:
    """The fraction of the values that agree, except for rounding; 0 for signatures of different lengths."""
    if len(one) != len(other):
        return 0.0
    return sum(abs(a - b) <= ROUNDING * max(abs(a), abs(b)) for a, b in zip(one, other, strict=True)) / len(one)


def _is_matrix(tensor: Tensor) -> bool:
    """False for norms and biases, which start at 1 and 0 in every model; some stay near there."""
    return tensor.ndim >= 2 and tensor.numel() > len(tensor)


def _value(key: str, tensor: Tensor) -> float:
    place = zlib.crc32(key.encode()) % tensor.numel()
    value = tensor[torch.unravel_index(torch.tensor(place), tensor.shape)].float().item()
    return float(f"{value:.6g}") if math.isfinite(value) else 0.0
