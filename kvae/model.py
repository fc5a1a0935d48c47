"""KVAE-3D: a causal video autoencoder of the grid 4x8x8, run in segments of 17, 16, 16 … frames.

    kvae = KVAE(KVAEConfig())
    z = kvae.encode(video)      # [B, 3, T, H, W] in −1..1  →  [B, 16, t, H/8, W/8],  T = 4(t − 1) + 1
    video = kvae.decode(z)

    # B batch, T frames, t latent frames, H/W pixels, h/w latent rows and columns
    x_B3THW, z_Bcthw

Method: https://github.com/kandinskylab/kvae-1. Submodule names are those of the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SEGMENT_FRAMES, KVAEConfig
from .layers import Cache, CausalConv3d, Downsample, ResnetBlock, SpatialNorm, Upsample


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents: `mean` and `logvar`, both [B, c, t, h, w], raw."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, [B, c, t, h, w]. The log-variance is clamped to −30..20, as in diffusers."""
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + noise * (0.5 * self.logvar.clamp(-30, 20)).exp()


class Mid(nn.Module):
    """The two blocks at the lowest resolution."""

    def __init__(self, channels: int, groups: int, z_channels: int | None = None):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, z_channels)
        self.block_2 = ResnetBlock(channels, channels, groups, z_channels)

    def forward(self, x_BCTHW: Tensor, cache: Cache, *z: Tensor) -> Tensor:
        return self.block_2(self.block_1(x_BCTHW, cache, *z), cache, *z)


class Level(nn.Module):
    """The blocks of one resolution, and the resampler (`downsample` or `upsample`) that leaves it."""

    def __init__(self, widths: list[int], groups: int, z_channels: int | None = None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(i, o, groups, z_channels) for i, o in pairwise(widths))

    def forward(self, x_BCTHW: Tensor, cache: Cache, *z: Tensor) -> Tensor:
        for block in self.block:
            x_BCTHW = block(x_BCTHW, cache, *z)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BCTHW = getattr(self, name)(x_BCTHW, cache)
        return x_BCTHW


class Encoder(nn.Module):
    """One segment of frames → mean and log-variance of its latents."""

    def __init__(self, config: KVAEConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        groups = config.norm_groups
        self.conv_in = CausalConv3d(3, config.ch)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            level = Level([before] + [width] * config.num_res_blocks, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, time=i < config.temporal_levels)
            self.down.append(level)
        self.mid = Mid(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_channels)

    def forward(self, x_B3THW: Tensor, cache: Cache) -> Tensor:
        """[B, 3, T, H, W] → [B, 2c, t, h, w], means first."""
        h = self.conv_in(x_B3THW, cache)
        for level in self.down:
            h = level(h, cache)
        h = F.silu(self.norm_out(self.mid(h, cache)))
        return self.conv_out(h, cache)


class Decoder(nn.Module):
    """One segment of latents → its frames."""

    def __init__(self, config: KVAEConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        groups, z_channels = config.norm_groups, config.z_channels
        self.conv_in = CausalConv3d(z_channels, widths[-1])
        self.mid = Mid(widths[-1], groups, z_channels)
        self.up = nn.ModuleList()  # from full resolution down, as in the checkpoint; run from the end
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level([before] + [width] * (config.num_res_blocks + 1), groups, z_channels)
            if i > 0:
                level.upsample = Upsample(width, time=i >= len(widths) - config.temporal_levels)
            self.up.append(level)
        self.norm_out = SpatialNorm(widths[0], z_channels, groups)
        self.conv_out = CausalConv3d(widths[0], 3)

    def forward(self, z_Bcthw: Tensor, cache: Cache) -> Tensor:
        """[B, c, t, h, w] → [B, 3, T, H, W]; T is 4t − 3 at the start of a stream, 4t later on."""
        first = self.conv_in not in cache
        h = self.mid(self.conv_in(z_Bcthw, cache), cache, z_Bcthw)
        for level in reversed(self.up):
            h = level(h, cache, z_Bcthw)
        h = F.silu(self.norm_out(h, z_Bcthw, first))
        return self.conv_out(h, cache)


class KVAE(nn.Module):
    """KVAE-3D-1.0. Pixels are x/128 − 1 for x in 0..255 (see `kvae.pixels`); latents are raw, in any float dtype."""

    def __init__(self, config: KVAEConfig | None = None):
        super().__init__()
        self.config = config or KVAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode_stream(self, x_B3THW: Tensor) -> Iterator[Posterior]:
        """Posterior of each segment in turn, for [B, 3, T, H, W] with T = 4n + 1 (pad with `pad_frames`).

        Raises:
            ValueError: the shape is not one the model takes.
        """
        self._check(x_B3THW, 3, "video", self.config.spatial_factor)
        cadence = self.config.temporal_compress_times
        if (x_B3THW.shape[2] - 1) % cadence:
            raise ValueError(f"video has {x_B3THW.shape[2]} frames; expected {cadence}n + 1: use kvae.pad_frames")
        cache: Cache = {}
        for segment in _segments(x_B3THW, SEGMENT_FRAMES):
            yield Posterior(*self.encoder(segment, cache).chunk(2, dim=1))

    def decode_stream(self, z_Bcthw: Tensor) -> Iterator[Tensor]:
        """Frames of each segment in turn, [B, 3, 17 or 16, H, W], for latents [B, c, t, h, w].

        Raises:
            ValueError: the shape is not one the model takes.
        """
        self._check(z_Bcthw, self.config.z_channels, "latent", 1)
        cache: Cache = {}
        for segment in _segments(z_Bcthw, SEGMENT_FRAMES // self.config.temporal_compress_times):
            yield self.decoder(segment, cache)

    def posterior(self, x_B3THW: Tensor) -> Posterior:
        """[B, 3, T, H, W] in −1..1, T = 4n + 1 → the posterior of the latents, [B, c, n + 1, H/8, W/8]."""
        parts = list(self.encode_stream(x_B3THW))
        return Posterior(torch.cat([p.mean for p in parts], 2), torch.cat([p.logvar for p in parts], 2))

    def encode(self, x_B3THW: Tensor) -> Tensor:
        """The latent of a video: its posterior's mean, [B, c, t, h, w], raw."""
        return torch.cat([posterior.mean for posterior in self.encode_stream(x_B3THW)], dim=2)

    def decode(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents [B, c, t, h, w] → video [B, 3, 4(t − 1) + 1, 8h, 8w], about −1..1, not clipped."""
        return torch.cat(list(self.decode_stream(z_Bcthw)), dim=2)

    def _check(self, x: Tensor, channels: int, name: str, multiple: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, {channels}, T, H, W]")
        if x.shape[3] % multiple or x.shape[4] % multiple:
            raise ValueError(f"{name} is {x.shape[3]}x{x.shape[4]} pixels; expected multiples of {multiple}")


def _segments(x: Tensor, length: int) -> Iterator[Tensor]:
    """Split [B, C, T, H, W] over time into length + 1, length, length … frames, the last one shorter."""
    yield x[:, :, : length + 1]
    for start in range(length + 1, x.shape[2], length):
        yield x[:, :, start : start + length]
