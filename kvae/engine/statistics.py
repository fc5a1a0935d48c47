"""GroupNorm's statistics over a whole feature map, and the memory that gathering them takes.

They are gathered from strips of rows. PyTorch's statistics of a batch norm read a map once and copy nothing. On a CPU,
they are 3 to 30 times as fast as `var_mean`.

# B batch, C channels, T frames, H/W rows and columns, lo:hi rows
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..layers import wide
from .feature_map import FeatureMap, Materialized
from .strips import even_strips, largest_strip

STATISTICS_BYTES = 32 << 20  # of the float32 copy, made by strips, on devices without a batch norm's statistics
BATCH_NORM_DEVICES = ("cpu", "cuda")  # those with torch.batch_norm_update_stats
MOST_VALUES = 1 << 30  # on CUDA at once: of more than 2³¹ values, it would make a float32 copy
Span = tuple[int, int]
Moments = tuple[Tensor, Tensor]  # mean and variance


def group_affine(norm: nn.GroupNorm, source: FeatureMap, strips: Iterable[Span]) -> Moments:
    """GroupNorm over a whole feature map, as scale and shift, [B, C, 1, 1, 1] each in at least float32.

    Args:
        strips: bounds of the rows to compute at a time, if the source is not in memory.
    """
    H = source.shape[3]
    bounds = list(strips)
    if isinstance(source, Materialized):
        bounds = list(even_strips(H, _rows_at_a_time(source, source.x.device)))
    return scale_and_shift(norm, [channel_moments(source(lo, hi)) for lo, hi in bounds], [hi - lo for lo, hi in bounds])


def scale_and_shift(norm: nn.GroupNorm, moments: Sequence[Moments], sizes: Sequence[int]) -> Moments:
    """GroupNorm over a map, as scale and shift, [B, C, 1, 1, 1] each, from the moments of the channels of its parts.

    Args:
        moments: mean and variance of each part, [B, C] each.
        sizes: of each part, relative to the others.
    """
    # [parts, B, groups, channels of a group]; a group's variance is the mean of the variances of its parts plus the
    # variance of their means
    means, variances = (torch.stack(m).unflatten(2, (norm.num_groups, -1)) for m in zip(*moments, strict=True))
    weight = shares(sizes, means)
    mean = (weight * means).sum(0).mean(-1, keepdim=True)
    variance = (weight * (variances + (means - mean).square())).sum(0).mean(-1, keepdim=True)
    scale = wide(norm.weight).view(norm.num_groups, -1) * (variance + norm.eps).rsqrt()
    shift = wide(norm.bias).view(norm.num_groups, -1) - mean * scale
    return scale.flatten(1)[..., None, None, None], shift.flatten(1)[..., None, None, None]


def statistics_bytes(source: FeatureMap, rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """The most bytes that `group_affine` needs, with strips of this many rows if the source is not in memory."""
    B, C, T, _, W = source.shape
    copied = 4 * B * C * T * W if dtype.itemsize < 4 and device.type not in BATCH_NORM_DEVICES else 0
    if isinstance(source, Materialized):
        return copied * largest_strip(source.shape[3], _rows_at_a_time(source, device))
    return max(source.peak_bytes(rows), source.result_bytes(rows) + copied * rows)


def _rows_at_a_time(source: Materialized, device: torch.device) -> int:
    """Rows of a map in memory whose statistics are gathered at once."""
    B, C, T, H, W = source.shape
    return H if device.type in BATCH_NORM_DEVICES else STATISTICS_BYTES // (4 * B * C * T * W)


def channel_moments(x_BCTHW: Tensor) -> Moments:
    """Mean and variance of each channel of each clip, [B, C] each in at least float32."""
    if x_BCTHW.device.type not in BATCH_NORM_DEVICES:
        variance, mean = torch.var_mean(wide(x_BCTHW), dim=(2, 3, 4), correction=0)
        return mean, variance
    gather = _cuda_moments if x_BCTHW.is_cuda else _batch_norm_moments
    mean, variance = (torch.stack(m) for m in zip(*map(gather, x_BCTHW.split(1)), strict=True))
    return mean, variance


def _batch_norm_moments(x_1C: Tensor) -> Moments:
    """Mean and variance, [C] each, of x [1, C, …]."""
    # given float32 running statistics, it also accumulates in float32
    dtype = torch.promote_types(x_1C.dtype, torch.float32)
    unused = torch.zeros(x_1C.shape[1], dtype=dtype, device=x_1C.device)
    return torch.batch_norm_update_stats(x_1C, unused, unused, 0.0)


def _cuda_moments(x_1CTHW: Tensor) -> Moments:
    """The same by kernels that copy nothing: CUDA has them for pictures in channels-last memory, not for clips.

    Source: batch_norm_choose_impl in PyTorch's aten/src/ATen/native/cuda/Normalization.cu.
    """
    parts = [part for picture in _pictures(x_1CTHW) for part in picture.chunk(-(-picture.numel() // MOST_VALUES), 2)]
    means, variances = (torch.stack(m) for m in zip(*map(_batch_norm_moments, parts), strict=True))
    weight = shares([part.shape[2] for part in parts], means)
    mean = (weight * means).sum(0)
    return mean, (weight * (variances + (means - mean).square())).sum(0)


def _pictures(x_1CTHW: Tensor) -> Sequence[Tensor]:
    """The frames as one picture, one below the other, or one by one if they are only slices: views, [1, C, rows, W]."""
    _, C, T, H, W = x_1CTHW.shape
    frames_adjoin = x_1CTHW.stride(2) == H * x_1CTHW.stride(3)
    return [x_1CTHW.view(1, C, T * H, W)] if frames_adjoin else x_1CTHW.unbind(2)


def shares(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Each size divided by their sum, along the first axis of a tensor with as many axes as `like`."""
    # filled on the device: a copy from the host could wait until the device has done all its work
    return torch.cat([like.new_full((1,) * like.ndim, n / sum(sizes)) for n in sizes])
