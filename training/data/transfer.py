"""Clips on their way to a device, and latents on their way back. On CUDA, the host does not wait for either.

latents = to_host([vae.encode(to_device(frames, device))])     # the GPU has only been told what to do
...                                                            # read the next clips meanwhile
(z,) = latents()                                               # now the host waits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_host(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start to copy tensors of one device to the host. The function returned waits for the copies, and returns them."""
    if not tensors[0].is_cuda:
        copies = [each.cpu() for each in tensors]
        return lambda: copies
    pinned = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
    for copy, each in zip(pinned, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    done = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait() -> list[Tensor]:
        done.synchronize()
        return pinned

    return wait
