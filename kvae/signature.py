"""Which weights a model has, as a few numbers: the same after a conversion to bfloat16, or under other names.

The hash of a file tells only whether two files are the same. A signature is of the values: one of each of 64 tensors,
at places that depend on nothing but the tensors' names and shapes. Weights that were trained apart, or further, differ
in nearly all of them; rounding moves them by a few thousandths.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

MOST = 64  # values of a signature
ROUNDING = 1 / 16  # of a value, that a conversion may change: bfloat16 rounds by 1/512 at most
AGREEING = 0.9  # the share of values that must be the same


def signature(tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Of the weights of a state dict, by their official names; empty where they have no values (the meta device)."""
    matrices = [key for key in sorted(tensors) if _is_matrix(tensors[key])]
    if any(tensors[key].is_meta for key in matrices):
        return ()
    chosen = [matrices[i * len(matrices) // MOST] for i in range(MOST)] if len(matrices) > MOST else matrices
    return tuple(_value(key, tensors[key]) for key in chosen)


def same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two signatures are of the same weights, rounding aside; nothing is known of an empty one, so it is."""
    if not one or not other:
        return True
    if len(one) != len(other):
        return False
    agree = sum(abs(a - b) <= ROUNDING * max(abs(a), abs(b)) for a, b in zip(one, other, strict=True))
    return agree >= AGREEING * len(one)


def _is_matrix(tensor: Tensor) -> bool:
    """Norms and biases are left out: they start at 1 and 0 everywhere, and some stay near it."""
    return tensor.ndim >= 2 and tensor.numel() > len(tensor)


def _value(key: str, tensor: Tensor) -> float:
    place = zlib.crc32(key.encode()) % tensor.numel()
    value = tensor[tuple(int(i) for i in np.unravel_index(place, tuple(tensor.shape)))].float().item()
    return float(f"{value:.6g}") if math.isfinite(value) else 0.0
