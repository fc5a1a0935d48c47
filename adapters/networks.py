"""The adapter networks: one latent grid in, the same grid in another space out.

All but `PointwiseNet` are causal and normalise each position by itself. A single frame, a tile with a margin of
`radius` latents, and a stream therefore give the same values as the whole clip. To stream a clip in little memory:

    cache = network.start(z)
    for piece in z.split(4, dim=2):  # in order
        yield network(piece, cache)

`PointwiseNet` streams, too, but it must see the whole clip at the start: it gathers the statistics of its norms there.
`values` tells beforehand how much memory that takes.

    # B batch, c channels, t latent frames, h/w latent rows and columns
    z_Bcthw
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kvae.engine import winograd
from ..kvae.engine.convolution import Conv3d
from ..kvae.engine.layout import fastest_format
from ..kvae.engine.statistics import scale_and_shift
from ..kvae.layers import Cache, CausalConv3d, name_streamed, wide


class ClipNorm(nn.GroupNorm):
    """GroupNorm over t, h and w of the whole clip. In a stream, the cache holds the clip's scale and shift."""

    name: str  # its key in a cache

    def forward(self, x_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, c, t, h, w] → the same shape."""
        if cache is None:
            return super().forward(x_Bcthw)
        scale, shift = cache[self.name]
        return torch.addcmul(shift, x_Bcthw, scale)


class PointwiseBlock(nn.Module):
    """Residual: (GroupNorm, SiLU, 1x1x1 convolution) twice."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = ClipNorm(8, width, eps=1e-6)
        self.conv1 = Conv3d(width, width, 1)
        self.norm2 = ClipNorm(8, width, eps=1e-6)
        self.conv2 = Conv3d(width, width, 1)

    def inner(self, x: Tensor, cache: Cache | None) -> Tensor:
        """What the second norm reads."""
        return self.conv1(F.silu(self.norm1(x, cache)))

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.inner(x, cache), cache)))


class PointwiseNet(nn.Module):
    """The network of the published adapters: 1x1x1 convolutions, 2,368 parameters at 16 channels.

    GroupNorm computes statistics over t, h and w. All else is done position by position, so a stream is exact once
    `start` has seen the whole clip.
    """

    radius = 0  # of the convolutions; the norms see the whole clip

    def __init__(self, in_channels: int, out_channels: int, width: int = 16, blocks: int = 3):
        super().__init__()
        self.config = {"in_channels": in_channels, "out_channels": out_channels, "width": width, "blocks": blocks}
        self.in_proj = Conv3d(in_channels, width, 1)
        self.blocks = nn.ModuleList(PointwiseBlock(width) for _ in range(blocks))
        self.out_proj = Conv3d(width, out_channels, 1)
        self.norms = {name: module for name, module in self.named_modules() if isinstance(module, ClipNorm)}
        for name, norm in self.norms.items():
            norm.name = name

    def start(self, z_Bcthw: Tensor) -> Cache:
        """The cache of a stream of this clip [B, c, t, h, w]: the scale and shift of each norm, [2, B, width, 1, 1, 1].

        Each norm is one pass over the clip, one frame at a time, through the layers before it.
        """
        cache: Cache = {}
        like, layout = self.in_proj.weight, fastest_format(z_Bcthw.device)
        for i, norm in enumerate(self.norms.values()):
            frames = (z.to(like.dtype).contiguous(memory_format=layout) for z in z_Bcthw.split(1, dim=2))
            moments = [_mean_and_variance(self._norm_input(i, frame, cache)) for frame in frames]
            affine = scale_and_shift(norm, moments, [1] * len(moments))
            cache[norm.name] = torch.stack(affine).to(like.dtype)
        return cache

    def forward(self, z_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, c, t, h, w] → [B, c', t, h, w].

        Raises:
            ValueError: the cache is not one that `start` has made.
        """
        if cache is not None and cache.keys() != self.norms.keys():
            raise ValueError(
                "this network normalises over the whole clip: call it with the whole clip and no cache, or with the "
                "cache that `start` makes of the whole clip"
            )
        h = self.in_proj(z_Bcthw)
        for block in self.blocks:
            h = block(h, cache)
        return self.out_proj(h)

    def values(self, t: int, h: int, w: int) -> tuple[int, int]:
        """The most values that it makes at a time for a piece of t frames, and those that its cache keeps."""
        width = self.config["width"]
        return t * h * w * max(3 * width, width + self.config["out_channels"]), 2 * width * len(self.norms)

    def _norm_input(self, i: int, z_Bcthw: Tensor, cache: Cache) -> Tensor:
        """What the i-th norm reads."""
        h = self.in_proj(z_Bcthw)
        blocks: list[PointwiseBlock] = list(self.blocks)  # type: ignore[arg-type]
        for block in blocks[: i // 2]:
            h = block(h, cache)
        return blocks[i // 2].inner(h, cache) if i % 2 else h


def _mean_and_variance(x_Bcthw: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel, [B, c]; with gradients, unlike `statistics.channel_moments`."""
    variance, mean = torch.var_mean(wide(x_Bcthw), dim=(2, 3, 4), correction=0)
    return mean, variance


class CausalNet(nn.Module):
    """A network that sees only the past, so that a stream needs nothing to start with."""

    def start(self, z_Bcthw: Tensor) -> Cache:
        """The cache of a new stream."""
        return {}

    def values(self, t: int, h: int, w: int) -> tuple[int, int]:
        """The most values that it makes at a time for a piece of t frames, and those that its cache keeps."""
        raise NotImplementedError

    def _kept(self, h: int, w: int) -> int:
        """Values of the past frames that all convolutions keep."""
        convolutions = [module for module in self.modules() if isinstance(module, CausalConv3d)]
        return sum(_past(each) * each.conv.in_channels for each in convolutions) * h * w


def _past(conv: CausalConv3d) -> int:
    """Past frames that a convolution reads."""
    return conv.conv.kernel_size[0] - 1


def _made(conv: CausalConv3d, t: int, h: int, w: int) -> int:
    """Values that a convolution of t frames makes beside those that its cache keeps: frames with their past, the same
    with a border, the result, and the past before it is replaced."""
    weight, past = conv.conv.weight, _past(conv)
    outputs, inputs = weight.shape[:2]
    padded = (t + past) * (h * w + (h + 2) * (w + 2)) if past else 0
    workspace = winograd.workspace_bytes(weight, t, h, w) // weight.itemsize
    return inputs * (padded + past * h * w) + outputs * t * h * w + workspace


class Affine(CausalNet):
    """An affine map: one convolution, causal in time. `training.adapters.ridge` fits it in closed form.

    Args:
        kernel: 1, or 3 for a neighbourhood of 3x3x3.

    Raises:
        ValueError: the kernel is neither 1 nor 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        super().__init__()
        if kernel not in (1, 3):
            raise ValueError(f"kernel is {kernel}; expected 1 or 3")
        self.config = {"in_channels": in_channels, "out_channels": out_channels, "kernel": kernel}
        self.radius = kernel // 2
        self.affine = CausalConv3d(in_channels, out_channels, kernel)
        name_streamed(self)

    def forward(self, z_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, c, t, h, w] → [B, c', t, h, w]."""
        return self.affine(z_Bcthw, {} if cache is None else cache)

    def values(self, t: int, h: int, w: int) -> tuple[int, int]:
        return _made(self.affine, t, h, w), self._kept(h, w)


class PositionNorm(nn.Module):
    """RMS norm over the channels of each position, with a gain for each channel.

    Unlike KVAE's RMSNorm it has an epsilon, 1e-6 under the root, and adapter files name its weight `gain`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x_Bcthw: Tensor) -> Tensor:
        return x_Bcthw * (x_Bcthw.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain


class ResidualBlock(nn.Module):
    """Residual: norm, SiLU, causal 3x3x3 convolution, SiLU, 1x1x1 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = PositionNorm(width)
        self.conv1 = CausalConv3d(width, width)
        self.conv2 = Conv3d(width, width, 1)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        h = self.conv1(F.silu(self.norm(x)), cache)
        return x + self.conv2(F.silu(h))


class Residual(CausalNet):
    """The default: an affine 3x3x3 causal map plus a residual branch whose last layer starts at zero.

    The branch reads latents normalised per channel, and its output is multiplied by the target's standard deviation.
    The statistics `source_mean`, `source_std` and `target_std`, each [c, 1, 1, 1], are those of the training set.
    """

    source_mean: Tensor
    source_std: Tensor
    target_std: Tensor

    def __init__(self, in_channels: int, out_channels: int, width: int = 64, blocks: int = 2):
        super().__init__()
        self.config = {"in_channels": in_channels, "out_channels": out_channels, "width": width, "blocks": blocks}
        self.radius = 1 + blocks
        self.affine = CausalConv3d(in_channels, out_channels)
        self.register_buffer("source_mean", torch.zeros(in_channels, 1, 1, 1))
        self.register_buffer("source_std", torch.ones(in_channels, 1, 1, 1))
        self.register_buffer("target_std", torch.ones(out_channels, 1, 1, 1))
        self.conv_in = CausalConv3d(in_channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.norm_out = PositionNorm(width)
        self.conv_out = Conv3d(width, out_channels, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]
        name_streamed(self)

    def forward(self, z_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, c, t, h, w] → [B, c', t, h, w]."""
        cache = {} if cache is None else cache
        h = self.conv_in((z_Bcthw - self.source_mean) / self.source_std, cache)
        for block in self.blocks:
            h = block(h, cache)
        return self.affine(z_Bcthw, cache) + self.target_std * self.conv_out(self.norm_out(h))

    def values(self, t: int, h: int, w: int) -> tuple[int, int]:
        frame, width = t * h * w, self.config["width"]
        stages = [
            frame * self.config["in_channels"] + _made(self.conv_in, t, h, w),
            *(frame * 2 * width + _made(block.conv1, t, h, w) for block in self.blocks),  # type: ignore[arg-type]
            frame * width + _made(self.affine, t, h, w),
            frame * (3 * width + 2 * self.config["out_channels"]),
        ]
        return max(stages), self._kept(h, w)


Network = PointwiseNet | Affine | Residual
NETWORKS: dict[str, type[Network]] = {"published": PointwiseNet, "affine": Affine, "residual": Residual}
MOST = 4096  # the largest setting (channels, blocks, kernel) read from a file; networks in use have up to 128


def network_name(network: Network) -> str:
    """The name of a network in NETWORKS, in adapter files and in `train --network`."""
    return next(name for name, cls in NETWORKS.items() if type(network) is cls)


def build_network(name: str, **config: int) -> Network:
    """Build an untrained network.

    Raises:
        ValueError: the name is unknown, or the network does not have or allow a setting.
    """
    if name not in NETWORKS:
        raise ValueError(f"no adapter network is called {name!r}; the known ones are {', '.join(NETWORKS)}")
    for setting, value in config.items():
        least = 0 if setting == "blocks" else 1
        if type(value) is not int or not least <= value <= MOST:
            raise ValueError(f"{setting} is {repr(value)[:60]}; expected a whole number from {least} to {MOST}")
    try:
        return NETWORKS[name](**config)
    except TypeError as error:
        raise ValueError(f"the network {name!r} does not accept these settings: {error}") from None
