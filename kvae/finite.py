"""Check for NaN and infinity, at the cost of reading the values once."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Whether no value of a float tensor is NaN or infinite. True on the meta device, where there are no values."""
    if x.is_meta or not x.numel():
        return True
    # if a value is not finite, an extreme is not either; unlike torch.isfinite, aminmax needs no memory
    wide = x.detach() if x.dtype.itemsize > 1 else x.detach().to(torch.bfloat16)  # aminmax supports no 8-bit floats
    return all(torch.isfinite(extreme).item() for extreme in wide.aminmax())
