"""3-D convolutions, each by the fastest way on a CPU; on other devices PyTorch's, or 2-D ones (`.by_frames`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import by_frames, winograd

ONE_DNN = torch.backends.mkldnn.is_available() and hasattr(torch, "mkldnn_convolution")


def wants_autograd_or_graph() -> bool:
    """Whether autograd or a graph capture may record the operators. PyTorch's own operators are best then."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def conv3d(x_BiTHW: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
    """The result of `F.conv3d(x, weight, bias, stride)`: [B, i, T, H, W] → [B, o, T', H', W'].

    With gradients and during graph capture, it calls that function.
    """
    if by_frames.ENABLED and not wants_autograd_or_graph():
        return by_frames.conv3d(x_BiTHW, weight, bias, stride)
    if x_BiTHW.device.type != "cpu" or wants_autograd_or_graph():
        return F.conv3d(x_BiTHW, weight, bias, stride)
    sides = [n - k + 1 for n, k in zip(x_BiTHW.shape[2:], weight.shape[2:], strict=True)]
    if x_BiTHW.dtype == torch.bfloat16 and sides[2] <= stride[2] > 1:
        # of a result of one column, oneDNN 3.12 (PyTorch 2.13) can leave values as they were in memory
        return conv3d(x_BiTHW.float(), weight.float(), None if bias is None else bias.float(), stride).bfloat16()
    if bias is not None and stride == (1, 1, 1) and winograd.is_faster(weight, *sides):
        return winograd.conv3d(x_BiTHW, weight, bias)
    if ONE_DNN and x_BiTHW.dtype == torch.float32:
        # PyTorch uses oneDNN for large inputs only. It would copy strips of few rows once for each of the 27 taps,
        # which is up to 15 times slower
        return torch.mkldnn_convolution(x_BiTHW, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(x_BiTHW, weight, bias, stride)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` without padding, computed by `conv3d`."""

    def forward(self, x_BiTHW: Tensor) -> Tensor:
        """[B, i, T, H, W] → [B, o, T', H', W']."""
        return conv3d(x_BiTHW, self.weight, self.bias, self.stride)  # type: ignore[arg-type]
