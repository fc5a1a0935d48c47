"""Where a tensor's values lie in memory: as the device's convolutions want them.

cuDNN transposes what does not lie in channels-last memory, weights too, at every call.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CHANNELS_LAST = ("cpu", "cuda")  # devices whose convolutions are fastest with feature maps in channels-last memory


def fastest_format(device: torch.device) -> torch.memory_format:
    """The memory format of feature maps."""
    return torch.channels_last_3d if device.type in CHANNELS_LAST else torch.contiguous_format


def weight_format(device: torch.device) -> torch.memory_format:
    """The memory format of a convolution's weights. On a CPU, `.winograd` and oneDNN read them in their own order."""
    return torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format


def lay_out_weights(weights: Iterable[Tensor]) -> None:
    """Give frozen weights of convolutions, [o, i, k, k, k], the layout that is fastest on their device, in place."""
    for weight in weights:
        if weight.ndim != 5 or weight.requires_grad or weight.is_inference():
            continue
        memory_format = weight_format(weight.device)
        if not weight.is_contiguous(memory_format=memory_format):
            weight.data = weight.data.contiguous(memory_format=memory_format)


def empty_in_layout_of(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of x's dtype, device and memory format."""
    # is_contiguous would miss slices, which are neither contiguous nor channels-last
    nhwc = x.stride(1) == 1 and x.shape[1] > 1
    memory_format = torch.channels_last_3d if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
