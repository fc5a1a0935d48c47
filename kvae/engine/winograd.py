"""3x3x3 convolutions on a CPU with 16 multiplications instead of 36: Winograd's F(2x2, 3x3) over rows and columns.

Additions alone transform a tile of 4x4 pixels. 16 matrix products, one for each position in the tile, multiply it by
the transformed weights, and further additions give 2x2 pixels. The products of the three taps over time are summed. The
result is that of `F.conv3d`, except for rounding. PyTorch's matrix products do the work, on all threads that they use.

Source: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, https://arxiv.org/abs/1509.09308.

    # B batch, i input channels, o output channels, T frames, H/W rows and columns of pixels, R/S of tiles
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 24 << 20  # of tiles and products held at a time, so that a processor's cache holds them
LEAST_CHANNELS = 128  # with fewer, the transforms of pixels take longer than the multiplications that they save
LEAST_TILES = 256  # with fewer, the transform of the weights does
WEIGHTS = 16 * 3  # transformed weights for each pair of channels
WEIGHT_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def is_faster(weight: Tensor, T: int, H: int, W: int) -> bool:
    """Whether this is faster than `F.conv3d` for an output of these sides. False in float64: this rounds to float32."""
    return (
        weight.device.type == "cpu"
        and weight.dtype.itemsize <= 4
        and weight.shape[2:] == (3, 3, 3)
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and T * (H // 2) * (W // 2) >= LEAST_TILES
        and not (weight.dtype.itemsize < 4 and multiplies_half())
    )


def workspace_bytes(weight: Tensor, T: int, H: int, W: int) -> int:
    """Bytes in use in addition to input and output, for an output of these sides; 0 if this is not faster."""
    if not is_faster(weight, T, H, W):
        return 0
    o, i = weight.shape[:2]
    weights = (WEIGHTS + (9 * 3 if weight.dtype.itemsize < 4 else 0)) * i * o
    count = min(((H + 1) // 2) * ((W + 1) // 2), tiles_in_a_chunk(weight, T))
    tiles, products = (16 * 4 * count * n for n in (i * (T + 2), o * T))
    # and three quarters of the larger: partly transformed tiles, or partly summed products
    return 4 * weights + tiles + products + 3 * max(tiles, products) // 4


def tiles_in_a_chunk(weight: Tensor, T: int) -> int:
    """How many tiles over T frames, with their products, fit a chunk."""
    o, i = weight.shape[:2]
    return max(1, CHUNK_BYTES // (16 * 4 * (i * (T + 2) + o * T)))


def multiplies_half() -> bool:
    """Whether the processor multiplies 16-bit numbers natively. This works in float32, and would lose that speed."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def conv3d(x_BiTHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The result of `F.conv3d`, in channels-last memory: [B, i, T + 2, H + 2, W + 2] → [B, o, T, H, W].

    Args:
        weight: [o, i, 3, 3, 3].
        bias: [o].
    """
    (B, i, T, H, W), o = x_BiTHW.shape, len(weight)
    T, H, W = T - 2, H - 2, W - 2
    y_BTHWo = x_BiTHW.new_empty(B, T, H, W, o)
    taps, bias = transform_weight(weight), bias.float()
    rows, columns = (H + 1) // 2, (W + 1) // 2
    most = tiles_in_a_chunk(weight, T)
    S = min(columns, most)
    R = min(rows, max(1, most // S))
    tiles, products = (torch.empty(16 * R * S * n) for n in (i * (T + 2), o * T))
    for x_iTHW, y_THWo in zip(x_BiTHW, y_BTHWo, strict=True):
        for row in range(0, rows, R):
            for column in range(0, columns, S):
                sides = min(R, rows - row), min(S, columns - column)
                x = block(x_iTHW.permute(1, 2, 3, 0), 2 * row, 2 * column, *sides)
                y = y_THWo[:, 2 * row : 2 * (row + R), 2 * column : 2 * (column + S)]
                combine(multiply(transform(x, *sides, tiles), taps, products), bias, y)
    return y_BTHWo.permute(0, 4, 1, 2, 3)


def transform_weight(weight: Tensor) -> Tensor:
    """[o, i, 3, 3, 3] → float32 [3, 16, i, o]; columns vary slowest among the 16 positions."""
    o, i = weight.shape[:2]
    g = weight.new_tensor(WEIGHT_TRANSFORM, dtype=torch.float32)
    spatial = torch.einsum("rh,sw->srhw", g, g).reshape(16, 9)
    # one product reads the weights in their own order, which is faster than a permuted copy
    everything = torch.block_diag(spatial, spatial, spatial)
    return (everything @ weight.float().view(o * i, 27).T).view(3, 16, o, i).transpose(2, 3)


def block(x_THWi: Tensor, row: int, column: int, R: int, S: int) -> Tensor:
    """The pixels of R x S tiles, float32 [T, 2R + 2, 2S + 2, i]; zeros beyond the picture."""
    x = x_THWi[:, row : row + 2 * R + 2, column : column + 2 * S + 2].float()
    below, right = 2 * R + 2 - x.shape[1], 2 * S + 2 - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def transform(x_THWi: Tensor, R: int, S: int, memory: Tensor) -> Tensor:
    """Transform pixels [T, 2R + 2, 2S + 2, i] to tiles [16, T, R·S, i], in the given memory."""
    T, _, W, i = x_THWi.shape
    rows = x_THWi.new_empty(4, T, R, W, i)
    differences(x_THWi, 1, R, rows)
    tiles = memory[: 16 * T * R * S * i].view(4, 4, T, R, S, i)
    differences(rows, 3, S, tiles)
    return tiles.view(16, T, R * S, i)


def differences(x: Tensor, dim: int, count: int, out: Tensor) -> None:
    """Four differences of each window of 4 values along `dim`, 2 apart: (0) − (2), (1) + (2), (2) − (1), (1) − (3)."""
    windows = x.unfold(dim, 4, 2).narrow(dim, 0, count)
    a, b, c, d = windows.unbind(-1)
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def multiply(tiles_pTni: Tensor, taps: Tensor, memory: Tensor) -> Tensor:
    """Multiply tiles [16, T + 2, n, i] by weights [3, 16, i, o] to [16, T, n, o], in the given memory."""
    p, T, n, _ = tiles_pTni.shape
    y = memory[: p * (T - 2) * n * taps.shape[3]].view(p, (T - 2) * n, -1)
    for k, tap in enumerate(taps):
        x = tiles_pTni[:, k : k + T - 2].flatten(1, 2)
        if k == 0:
            torch.bmm(x, tap, out=y)
        else:
            y.baddbmm_(x, tap)
    return y.view(p, T - 2, n, -1)


def combine(products_pTno: Tensor, bias: Tensor, out_THWo: Tensor) -> None:
    """Write products [16, T, R·S, o] to the pixels [T, H, W, o] of their tiles; pixels outside of `out` are dropped."""
    T, _, W, o = out_THWo.shape
    columns = products_pTno.view(4, 4, T, -1, (W + 1) // 2, o)
    for column, q in enumerate(sums(columns)):
        for row, y in enumerate(sums(q)):
            out = out_THWo[:, row::2, column::2]
            out.copy_(y.add_(bias)[:, : out.shape[1], : out.shape[2]])


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums of the four values along the first axis: (0) + (1) + (2), (1) − (2) − (3)."""
    return (x[0] + x[1]).add_(x[2]), (x[1] - x[2]).sub_(x[3])
