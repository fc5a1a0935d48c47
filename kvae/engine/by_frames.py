"""3-D convolutions as 2-D ones: frames are the batch, and the frames of a window are channels of one picture.

GPUs of AMD, and Apple's, may have slow 3-D convolutions and fast 2-D ones. Set the environment variable KVAE_CONV to 2d
to use them on every device. The result is that of `F.conv3d`, except for rounding: each value is still one sum. A chunk
of frames, or of rows if a frame is large, is copied and multiplied at a time.

    # B batch, i input channels, o output channels, T frames, H/W rows and columns
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import empty_in_layout_of

ENABLED = os.environ.get("KVAE_CONV") == "2d"
CHUNK_BYTES = 64 << 20  # of copied windows and their result at a time; one row of pixels may need more
Stride = tuple[int, int, int]


def conv3d(x_BiTHW: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride) -> Tensor:
    """The result of `F.conv3d(x, weight, bias, stride)`: [B, i, T, H, W] → [B, o, T', H', W'], in the layout of x."""
    o, _, taps, kernel_rows, _ = weight.shape
    sides = [(n - k) // s + 1 for n, k, s in zip(x_BiTHW.shape[2:], weight.shape[2:], stride, strict=True)]
    T, H, W = sides
    y = empty_in_layout_of(x_BiTHW, (len(x_BiTHW), o, T, H, W))
    kernel = weight.transpose(1, 2).flatten(1, 2).contiguous()  # [o, taps · i, kH, kW]
    frames, rows = chunk(weight, T, H, W, stride)
    for x_iTHW, y_oTHW in zip(x_BiTHW, y, strict=True):
        for t in range(0, T, frames):
            for h in range(0, H, rows):
                out = y_oTHW[:, t : t + frames, h : h + rows]
                below = (h + out.shape[2] - 1) * stride[1] + kernel_rows
                write(out, x_iTHW[:, t * stride[0] :, h * stride[1] : below], kernel, bias, taps, stride)
    return y


def write(out_oTHW: Tensor, x_iTHW: Tensor, kernel: Tensor, bias: Tensor | None, taps: int, stride: Stride) -> None:
    """Write the frames of the result that `out` has room for, from the first window in x on."""
    x_TiHW, count = x_iTHW.transpose(0, 1), (out_oTHW.shape[1] - 1) * stride[0] + 1
    windows = torch.cat([x_TiHW[k : k + count : stride[0]] for k in range(taps)], 1)
    out_oTHW.copy_(F.conv2d(windows, kernel, bias, stride[1:]).transpose(0, 1))


def chunk(weight: Tensor, T: int, H: int, W: int, stride: Stride) -> tuple[int, int]:
    """Frames and rows to compute at a time, for an output of these sides."""
    o, i, taps, kernel_rows, kernel_columns = weight.shape
    columns = (W - 1) * stride[2] + kernel_columns
    # windows and result, of a row and of the rows that only the next chunk has for itself
    row = weight.element_size() * (taps * i * stride[1] * columns + o * W)
    halo = weight.element_size() * taps * i * max(0, kernel_rows - stride[1]) * columns
    frames = CHUNK_BYTES // (row * H + halo)
    return (min(frames, T), H) if frames else (1, max(1, (CHUNK_BYTES - halo) // row))


def workspace_bytes(weights: Iterable[Tensor]) -> int:
    """The most bytes in use in addition to input and output, of convolutions with these weights; 0 if not enabled."""
    return CHUNK_BYTES + max(each.nbytes for each in weights if each.ndim == 5) if ENABLED else 0
