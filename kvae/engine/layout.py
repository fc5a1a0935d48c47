"""Where a tensor's values lie in memory: as the device's convolutions want them.

cuDNN transposes what does not lie in channels-last memory, weights too, at every call. MIOpen, AMD's library, is given
contiguous tensors unless PYTORCH_MIOPEN_SUGGEST_NHWC is set, and Apple's GPU always: there PyTorch would transpose the
others.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_nvidia(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU. PyTorch calls AMD's GPUs cuda, too."""
    return device.type == "cuda" and torch.version.hip is None


def fastest_format(device: torch.device) -> torch.memory_format:
    """The memory format of feature maps."""
    channels_last = device.type == "cpu" or is_nvidia(device)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def weight_format(device: torch.device) -> torch.memory_format:
    """The memory format of a convolution's weights. On a CPU, `.winograd` and oneDNN read them in their own order."""
    return torch.channels_last_3d if is_nvidia(device) else torch.contiguous_format


def lay_out_weights(weights: Iterable[Tensor]) -> None:
    """Give frozen weights of convolutions, [o, i, k, k, k], the layout that is fastest on their device, in place."""
    for weight in weights:
        if weight.ndim != 5 or weight.requires_grad:
            continue
        memory_format = weight_format(weight.device)
        if not weight.is_contiguous(memory_format=memory_format):
            # a weight stays what it is: hosts make theirs in inference mode, and only the others may meet gradients
            with torch.no_grad(), torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.contiguous(memory_format=memory_format)


def empty_in_layout_of(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of x's dtype, device and memory format."""
    # is_contiguous would miss slices, which are neither contiguous nor channels-last
    nhwc = x.stride(1) == 1 and x.shape[1] > 1
    memory_format = torch.channels_last_3d if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
