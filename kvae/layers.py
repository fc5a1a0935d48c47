"""The blocks of KVAE-3D, written for streams: every layer with a memory takes a `cache`.

A cache is a plain dict, one per stream, from a layer's name to the frames that it must see again. It belongs to
the caller, so one model serves any number of streams at a time. A layer that is not in the cache yet is at
the start of the stream.

    # B batch, C channels, T frames of the layer's own rate, t latent frames, H/W rows and columns
    x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KVAEConfig
from .engine.convolution import Conv3d, conv3d, recorded

Cache = dict[str, Tensor]
Sides = tuple[bool, bool, bool, bool]  # left, right, top, bottom


class Streamed(nn.Module):
    """A layer that remembers frames. Its `name`, the key of its memory in a cache, is given by the whole model."""

    name: str


def name_streamed(model: nn.Module) -> None:
    """Give every layer with a memory its name in this model."""
    for name, module in model.named_modules():
        if isinstance(module, Streamed):
            module.name = name


class CausalConv3d(Streamed):
    """Convolution that sees only the past: time is padded with the stream's first frame, space with a border.

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
        return self.conv(framed(x, self.padding) if kernel == 3 else x)


def remember(x_BCTHW: Tensor, cache: Cache, name: str, memory: int, stride: int = 1) -> Tensor:
    """x after the frames it follows: `memory` times the first frame at the start of a stream, else those in the cache.

    The cache then holds the frames that the next window of memory + 1 frames starts with; windows are `stride` apart.
    """
    past = cache[name] if name in cache else x_BCTHW[:, :, :1].expand(-1, -1, memory, -1, -1)
    x = torch.cat([past, x_BCTHW], dim=2) if past.shape[2] else x_BCTHW
    windows = (x.shape[2] - memory - 1) // stride + 1
    cache[name] = x[:, :, windows * stride :].clone()
    return x


def framed(x_BCTHW: Tensor, padding: str, sides: Sides = (True, True, True, True), inside: int = 1) -> Tensor:
    """x with a row or column more at these sides, filled as `fill_border` does, in its own memory format."""
    left, right, top, bottom = sides
    if recorded():  # filled in place, each side would copy the whole gradient
        mode = {1: "replicate", 2: "reflect"}[inside] if padding == "replicate" else "constant"
        return F.pad(x_BCTHW, (*map(int, sides), 0, 0), mode=mode)
    B, C, T, H, W = x_BCTHW.shape
    y = like(x_BCTHW, (B, C, T, H + top + bottom, W + left + right))
    y[:, :, :, top : top + H, left : left + W] = x_BCTHW
    fill_border(y, padding, sides, inside)
    return y


def fill_border(x_BCTHW: Tensor, padding: str, sides: Sides, inside: int = 1) -> None:
    """Fill the outermost rows and columns at these sides.

    Args:
        padding: "replicate" takes what is `inside` by so many, or "zeros".
    """
    for needed, dim, edge, source in zip(sides, (4, 4, 3, 3), (0, -1, 0, -1), (inside, -1 - inside) * 2, strict=True):
        if needed and padding == "replicate":
            x_BCTHW.select(dim, edge).copy_(x_BCTHW.select(dim, source))
        elif needed:
            x_BCTHW.select(dim, edge).zero_()


def like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of x's type, device and memory format."""
    nhwc = x.stride(1) == 1 and x.shape[1] > 1  # of a slice too, which is neither contiguous nor channels-last
    memory_format = torch.channels_last_3d if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Each position's channels scaled to a root mean square of 1, times gamma."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, C, T, H, W] → the same shape."""
        return F.normalize(x_BCTHW, dim=1) * (self.gamma * len(self.gamma) ** 0.5)


def make_norm(channels: int, config: KVAEConfig) -> nn.Module:
    """The encoder's norm, and the inner one of the decoder's."""
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6) if config.norm == "group" else RMSNorm(channels)


class SpatialNorm(nn.Module):
    """The decoder's norm: then a scale and a shift computed from the latent at each position."""

    def __init__(self, channels: int, config: KVAEConfig):
        super().__init__()
        self.norm_layer = make_norm(channels, config)
        self.conv_y = nn.Conv3d(config.z_channels, channels, 1)
        self.conv_b = nn.Conv3d(config.z_channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, z_Bcthw: Tensor, first: bool) -> Tensor:
        """[B, C, T, H, W] → the same shape; `first` says whether the segment starts the stream."""
        # 1x1x1 convolutions commute with the repetition: at the latent's resolution they cost next to nothing
        scale, shift = self.conv_y(z_Bcthw), self.conv_b(z_Bcthw)
        parts = list(modulate(self.norm_layer(x_BCTHW), scale, shift, first))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def modulate(
    x_BCTHW: Tensor, scale_BCthw: Tensor, shift_BCthw: Tensor, first: bool, out: Tensor | None = None
) -> Iterator[Tensor]:
    """x · scale + shift, each latent's scale and shift for the whole block of frames, rows and columns it covers.

    In one or two parts, over time: at the start of a stream the first latent is one frame. They are written to `out`,
    of the shape of x, where it is given.
    """
    head = 1 if first and scale_BCthw.shape[2] > 1 else 0
    for part in [slice(0, 1), slice(1, None)] if head else [slice(None)]:
        x, scale, shift = x_BCTHW[:, :, part], scale_BCthw[:, :, part], shift_BCthw[:, :, part]
        scale, shift = (s[:, :, :, None, :, None, :, None] for s in (scale, shift))
        y = None if out is None else blocks(out[:, :, part], scale)
        yield torch.addcmul(shift, blocks(x, scale), scale, out=y).reshape(x.shape)


def blocks(x_BCTHW: Tensor, scale_BCt1h1w1: Tensor) -> Tensor:
    """x with each axis as (latents, what one latent covers)."""
    t, h, w = scale_BCt1h1w1.shape[2::2]
    return x_BCTHW.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1))


class ResnetBlock(nn.Module):
    """Two causal convolutions beside a shortcut. In the decoder the norms are conditioned on the latent."""

    def __init__(self, in_channels: int, out_channels: int, config: KVAEConfig, conditioned: bool):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return SpatialNorm(channels, config) if conditioned else make_norm(channels, config)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, padding=config.padding)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, padding=config.padding)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def shortcut(self, x_BCTHW: Tensor) -> Tensor:
        """What the residual branch is added to."""
        if not hasattr(self, "nin_shortcut"):
            return x_BCTHW
        return conv3d(x_BCTHW, self.nin_shortcut.weight, self.nin_shortcut.bias)

    def forward(self, x_BCTHW: Tensor, cache: Cache, z_Bcthw: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] → [B, C', T, H, W]."""
        condition = () if z_Bcthw is None else (z_Bcthw, self.conv1.name not in cache)
        h = self.conv1(F.silu(self.norm1(x_BCTHW, *condition)), cache)
        h = self.conv2(F.silu(self.norm2(h, *condition)), cache)
        return self.shortcut(x_BCTHW) + h
