"""The adapter networks: one latent grid in, the same grid in another space out.

All but `PointwiseNet` are causal and normalise each position by itself. A single frame, a tile with a margin of
`radius` latents, and a stream therefore give the same values as the whole clip. To stream, pass a cache:

    cache = {}
    for z in latents:                # [B, c, t, h, w] pieces of one clip, in order
        yield network(z, cache)

    # B batch, c channels, t latent frames, h/w latent rows and columns
    z_Bcthw
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kvae.engine.convolution import Conv3d
from ..kvae.layers import Cache, CausalConv3d, name_streamed


class PointwiseBlock(nn.Module):
    """Residual: (GroupNorm, SiLU, 1x1x1 convolution) twice."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width, eps=1e-6)
        self.conv1 = Conv3d(width, width, 1)
        self.norm2 = nn.GroupNorm(8, width, eps=1e-6)
        self.conv2 = Conv3d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class PointwiseNet(nn.Module):
    """The network of the published adapters: 1x1x1 convolutions, 2,368 parameters at 16 channels.

    GroupNorm computes statistics over t, h and w, so the network needs the whole clip at once and cannot be streamed.
    """

    radius = 0  # of the convolutions; the norms see the whole clip

    def __init__(self, in_channels: int, out_channels: int, width: int = 16, blocks: int = 3):
        super().__init__()
        self.config = {"in_channels": in_channels, "out_channels": out_channels, "width": width, "blocks": blocks}
        self.in_proj = Conv3d(in_channels, width, 1)
        self.blocks = nn.ModuleList(PointwiseBlock(width) for _ in range(blocks))
        self.out_proj = Conv3d(width, out_channels, 1)

    def forward(self, z_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, c, t, h, w] → [B, c', t, h, w].

        Raises:
            ValueError: a cache is given.
        """
        if cache is not None:
            raise ValueError("this network normalises over the whole clip: call it with the whole clip and no cache")
        h = self.in_proj(z_Bcthw)
        for block in self.blocks:
            h = block(h)
        return self.out_proj(h)


class Affine(nn.Module):
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


class Residual(nn.Module):
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
