"""The blocks of KVAE-3D, written for streams: every layer that remembers frames has a `cache` argument.

A cache is a plain dict, one per stream, from a layer's name to the frames that the layer reads again in the next
segment. It belongs to the caller, so one model serves any number of streams at a time. A layer whose name is not in the
cache is at the start of the stream.

    # B batch, C channels, T frames of the layer's own rate, t latent frames, H/W rows and columns
    x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KVAEConfig
from .engine.convolution import Conv3d, conv3d, wants_autograd_or_graph
from .engine.layout import empty_in_layout_of

Cache = dict[str, Tensor]
Sides = tuple[bool, bool, bool, bool]  # left, right, top, bottom


class Streamed(nn.Module):
    """A layer that remembers frames. Its `name`, its key in a cache, comes from `name_streamed`."""

    name: str


def name_streamed(model: nn.Module) -> None:
    """Give every layer that remembers frames its name in this model."""
    for name, module in model.named_modules():
        if isinstance(module, Streamed):
            module.name = name


class CausalConv3d(Streamed):
    """Convolution that sees only the past. Time is padded with copies of the stream's first frame, space with a border.

    Args:
        kernel: 3 or 1, over time and space alike.
        padding: of space, "replicate" or "zeros".
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, padding: str = "replicate"):
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, kernel)
        self.padding = padding

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C', T, H, W]."""
        kernel = self.conv.kernel_size[0]
        x = remember(x_BCTHW, cache, self.name, memory=kernel - 1)
        return self.conv(pad_border(x, self.padding) if kernel == 3 else x)


def remember(x_BCTHW: Tensor, cache: Cache, name: str, memory: int, stride: int = 1) -> Tensor:
    """Prepend to x [B, C, T, H, W] its past frames: those in the cache, or copies of its first frame in a new stream.

    Afterwards the cache holds the frames that the next window starts with.

    Args:
        memory: number of past frames; windows have memory + 1 frames.
        stride: frames from one window to the next.
    """
    past = [cache[name]] if name in cache else [x_BCTHW[:, :, :1]] * memory  # an expanded frame would lose its layout
    x = torch.cat([*past, x_BCTHW], dim=2) if memory else x_BCTHW
    windows = (x.shape[2] - memory - 1) // stride + 1
    cache[name] = x[:, :, windows * stride :].clone()
    return x


def pad_border(x_BCTHW: Tensor, padding: str, sides: Sides = (True, True, True, True), inside: int = 1) -> Tensor:
    """Add a row or column to x at each of these sides, filled as by `fill_border`. The memory format stays the same."""
    left, right, top, bottom = sides
    if wants_autograd_or_graph():  # if borders were filled in place, each side would copy the whole gradient
        mode = {1: "replicate", 2: "reflect"}[inside] if padding == "replicate" else "constant"
        return F.pad(x_BCTHW, (*map(int, sides), 0, 0), mode=mode)
    B, C, T, H, W = x_BCTHW.shape
    y = empty_in_layout_of(x_BCTHW, (B, C, T, H + top + bottom, W + left + right))
    y[:, :, :, top : top + H, left : left + W] = x_BCTHW
    fill_border(y, padding, sides, inside)
    return y


def fill_border(x_BCTHW: Tensor, padding: str, sides: Sides, inside: int = 1) -> None:
    """Fill the outermost rows and columns of x at these sides, in place.

    Args:
        padding: "zeros", or "replicate": copy the row or column that lies `inside` steps further in.
        inside: 1 to replicate the edge, 2 to reflect at it.
    """
    for needed, dim, edge, source in zip(sides, (4, 4, 3, 3), (0, -1, 0, -1), (inside, -1 - inside) * 2, strict=True):
        if needed and padding == "replicate":
            x_BCTHW.select(dim, edge).copy_(x_BCTHW.select(dim, source))
        elif needed:
            x_BCTHW.select(dim, edge).zero_()


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Scale the channels of each position to a root mean square of 1, then by gamma."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, C, T, H, W] → the same shape."""
        return F.normalize(x_BCTHW, dim=1) * (self.gamma * len(self.gamma) ** 0.5)


def make_norm(channels: int, config: KVAEConfig) -> nn.Module:
    """The encoder's norm, which is also the inner norm of the decoder's `SpatialNorm`."""
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6) if config.norm == "group" else RMSNorm(channels)


class SpatialNorm(nn.Module):
    """The decoder's norm: a norm, then a scale and a shift that depend on the latent at each position."""

    def __init__(self, channels: int, config: KVAEConfig):
        super().__init__()
        self.norm_layer = make_norm(channels, config)
        self.conv_y = nn.Conv3d(config.z_channels, channels, 1)
        self.conv_b = nn.Conv3d(config.z_channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, z_Bcthw: Tensor, first: bool) -> Tensor:
        """[B, C, T, H, W] → the same shape.

        Args:
            first: whether the segment starts the stream, so that its first latent covers one frame.
        """
        # published: z is first repeated to x's size; 1x1x1 convolutions commute with that, and cost far less before it
        return apply_scale_shift(self.norm_layer(x_BCTHW), self.conv_y(z_Bcthw), self.conv_b(z_Bcthw), first)


def apply_scale_shift(
    x_BCTHW: Tensor, scale_BCthw: Tensor, shift_BCthw: Tensor, first: bool, out: Tensor | None = None
) -> Tensor:
    """x · scale + shift, with each latent's scale and shift for all frames, rows and columns that it covers.

    The result has the shape of x, and is written to `out` if that is given. The first latent of a stream covers one
    frame only, so it is computed apart from the others.
    """
    parts = []
    head = 1 if first and scale_BCthw.shape[2] > 1 else 0
    for part in [slice(0, 1), slice(1, None)] if head else [slice(None)]:
        x, scale, shift = x_BCTHW[:, :, part], scale_BCthw[:, :, part], shift_BCthw[:, :, part]
        scale, shift = (s[:, :, :, None, :, None, :, None] for s in (scale, shift))
        y = None if out is None else split_by_latent(out[:, :, part], scale)
        parts.append(torch.addcmul(shift, split_by_latent(x, scale), scale, out=y).reshape(x.shape))
    if out is not None:
        return out
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def split_by_latent(x_BCTHW: Tensor, scale_BCt1h1w1: Tensor) -> Tensor:
    """Split each of the axes T, H, W into two: the latents, and the positions that one latent covers."""
    t, h, w = scale_BCt1h1w1.shape[2::2]
    return x_BCTHW.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1))


class ResnetBlock(nn.Module):
    """Two causal convolutions and a shortcut. In the decoder the norms are conditioned on the latent."""

    def __init__(self, in_channels: int, out_channels: int, config: KVAEConfig, conditioned: bool):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return SpatialNorm(channels, config) if conditioned else make_norm(channels, config)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, padding=config.padding)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, padding=config.padding)
        self.shortcut_is_a_convolution = in_channels != out_channels
        if self.shortcut_is_a_convolution:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def shortcut(self, x_BCTHW: Tensor) -> Tensor:
        """The input, with as many channels as the output: [B, C, T, H, W] → [B, C', T, H, W]."""
        if not self.shortcut_is_a_convolution:
            return x_BCTHW
        return conv3d(x_BCTHW, self.nin_shortcut.weight, self.nin_shortcut.bias)

    def forward(self, x_BCTHW: Tensor, cache: Cache, z_Bcthw: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] → [B, C', T, H, W]."""
        condition = () if z_Bcthw is None else (z_Bcthw, self.conv1.name not in cache)
        h = self.conv1(F.silu(self.norm1(x_BCTHW, *condition)), cache)
        h = self.conv2(F.silu(self.norm2(h, *condition)), cache)
        return self.shortcut(x_BCTHW) + h
