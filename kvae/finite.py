"""Whether values are numbers, at the cost of reading them once."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Whether no value of a tensor of floats is NaN or infinite; of the meta device, which has none, it is true."""
    if x.is_meta or not x.numel():
        return True
    # the extremes are not finite where a value is not, and unlike torch.isfinite they take no memory
    wide = x.detach() if x.dtype.itemsize > 1 else x.detach().to(torch.bfloat16)  # of eight bits there are none
    return all(torch.isfinite(extreme).item() for extreme in wide.aminmax())
