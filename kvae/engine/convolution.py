"""3-D convolutions, on a CPU each in the way that takes least time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import winograd

ONE_DNN = torch.backends.mkldnn.is_available() and hasattr(torch, "mkldnn_convolution")


def recorded() -> bool:
    """Whether what runs may be wanted for gradients, or as a graph: then PyTorch's own operators are best."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def conv3d(x_BiTHW: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
    """What `F.conv3d(x, weight, bias, stride)` gives: [B, i, T, H, W] → [B, o, T', H', W'].

    With gradients, and in a graph that is being captured, it is that function.
    """
    if x_BiTHW.device.type != "cpu" or recorded():
        return F.conv3d(x_BiTHW, weight, bias, stride)
    sides = [n - k + 1 for n, k in zip(x_BiTHW.shape[2:], weight.shape[2:], strict=True)]
    if bias is not None and stride == (1, 1, 1) and winograd.pays(weight, *sides):
        return winograd.conv3d(x_BiTHW, weight, bias)
    if ONE_DNN and x_BiTHW.dtype == torch.float32:
        # PyTorch takes oneDNN for large inputs only; strips of few rows it would copy once for each of the 27 taps,
        # which takes 15 times as long
        return torch.mkldnn_convolution(x_BiTHW, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(x_BiTHW, weight, bias, stride)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` without padding, by `conv3d`."""

    def forward(self, x_BiTHW: Tensor) -> Tensor:
        """[B, i, T, H, W] → [B, o, T', H', W']."""
        return conv3d(x_BiTHW, self.weight, self.bias, self.stride)  # type: ignore[arg-type]
