"""The blocks of KVAE-3D, written for streams: every layer with a memory takes a `cache`.

A cache is a plain dict, one per stream, from layer to the frames that layer must see again. It belongs to
the caller, so one model serves any number of streams at a time. A layer that is not in the cache yet is at
the start of the stream.

    # B batch, C channels, T frames of the layer's own rate, t latent frames, H/W rows and columns
    x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = dict[nn.Module, Tensor]


class CausalConv3d(nn.Module):
    """Convolution that sees only the past: time is padded with the stream's first frame, space by replication.

    Args:
        kernel: (time, height, width), odd.
        time_stride: 1, or 2 to halve the frames.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3), time_stride=1):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1))

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C', ceil(T / stride), H, W] at the start of a stream, T / stride later on."""
        time, height, width = self.conv.kernel_size
        past = cache[self] if self in cache else x_BCTHW[:, :, :1].expand(-1, -1, time - 1, -1, -1)
        x = torch.cat([past, x_BCTHW], dim=2)
        stride = self.conv.stride[0]
        outputs = (x.shape[2] - time) // stride + 1
        cache[self] = x[:, :, outputs * stride :].clone()
        if height > 1:
            x = F.pad(x, (width // 2, width // 2, height // 2, height // 2, 0, 0), mode="replicate")
        return self.conv(x)


def to_rate_of(z_Bcthw: Tensor, x_BCTHW: Tensor, first: bool) -> Tensor:
    """Repeat latents (nearest) to the frames, rows and columns of x. The stream's first latent is one frame."""
    _, _, T, H, W = x_BCTHW.shape
    t, h, w = z_Bcthw.shape[2:]
    if first and t > 1:
        head, tail = z_Bcthw[:, :, :1], z_Bcthw[:, :, 1:]
        tail = tail.repeat_interleave((T - 1) // (t - 1), dim=2)
        z_Bcthw = torch.cat([head, tail], dim=2)
    else:
        z_Bcthw = z_Bcthw.repeat_interleave(T // t, dim=2)
    return z_Bcthw.repeat_interleave(H // h, dim=3).repeat_interleave(W // w, dim=4)


class SpatialNorm(nn.Module):
    """GroupNorm over a segment, then a scale and a shift computed from the latent at each position."""

    def __init__(self, channels: int, z_channels: int, groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = nn.Conv3d(z_channels, channels, 1)
        self.conv_b = nn.Conv3d(z_channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, z_Bcthw: Tensor, first: bool) -> Tensor:
        """[B, C, T, H, W] → the same shape; `first` says whether the segment starts the stream."""
        scale, shift = self.conv_y(z_Bcthw), self.conv_b(z_Bcthw)  # 1x1x1: commutes with the repetition
        x = self.norm_layer(x_BCTHW)
        return x * to_rate_of(scale, x, first) + to_rate_of(shift, x, first)


class ResnetBlock(nn.Module):
    """Two causal convolutions beside a shortcut. With `z_channels` the norms are conditioned on the latent."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, z_channels: int | None = None):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if z_channels is None:
                return nn.GroupNorm(groups, channels, eps=1e-6)
            return SpatialNorm(channels, z_channels, groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def shortcut(self, x_BCTHW: Tensor) -> Tensor:
        """What the residual branch is added to."""
        return self.nin_shortcut(x_BCTHW) if hasattr(self, "nin_shortcut") else x_BCTHW

    def forward(self, x_BCTHW: Tensor, cache: Cache, z_Bcthw: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] → [B, C', T, H, W]."""
        condition = () if z_Bcthw is None else (z_Bcthw, self.conv1 not in cache)
        h = self.conv1(F.silu(self.norm1(x_BCTHW, *condition)), cache)
        h = self.conv2(F.silu(self.norm2(h, *condition)), cache)
        return self.shortcut(x_BCTHW) + h


class Downsample(nn.Module):
    """Halve rows and columns, and frames where `time`: a mean over neighbours plus a strided convolution."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.spatial_conv = nn.Conv3d(
            channels, channels, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), padding_mode="reflect"
        )
        if time:
            self.temporal_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2)
        self.linear = nn.Conv3d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C, T', H/2, W/2]; T' is (T + 1) / 2 at the start of a stream, T / 2 later on."""
        x = F.avg_pool3d(x_BCTHW, (1, 2, 2)) + self.spatial_conv(x_BCTHW)
        if hasattr(self, "temporal_conv"):
            if self.temporal_conv in cache:
                mean = F.avg_pool3d(x, (2, 1, 1))
            else:
                mean = torch.cat([x[:, :, :1], F.avg_pool3d(x[:, :, 1:], (2, 1, 1))], dim=2) if x.shape[2] > 1 else x
            x = mean + self.temporal_conv(x, cache)
        return self.linear(x)


class Upsample(nn.Module):
    """Double rows and columns, and frames where `time`; the stream's first frame stays one frame."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.spatial_conv = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect")
        if time:
            self.temporal_conv = CausalConv3d(channels, channels, (3, 1, 1))
        self.linear = nn.Conv3d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C, T', 2H, 2W]; T' is 2T − 1 at the start of a stream, 2T later on."""
        x = x_BCTHW
        if hasattr(self, "temporal_conv"):
            x = x.repeat_interleave(2, dim=2)
            if self.temporal_conv not in cache:
                x = x[:, :, 1:]
            x = x + self.temporal_conv(x, cache)
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        return self.linear(x + self.spatial_conv(x))
