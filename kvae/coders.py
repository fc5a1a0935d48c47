"""Encoder and decoder of KVAE-3D: sequences of stages, each of which runs on all frames of a segment.

    # B batch, C channels, T frames, t latent frames, H/W pixels, h/w latent rows and columns
    x_B3THW, z_Bcthw

Submodule names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import KVAEConfig
from .engine.layout import lay_out_weights
from .layers import Cache, CausalConv3d, ResnetBlock, SpatialNorm, Streamed, make_norm
from .resample import Downsample, Resampler, Upsample


class Mid(nn.Module):
    """The two blocks at the lowest resolution."""

    def __init__(self, channels: int, config: KVAEConfig, conditioned: bool):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config, conditioned)
        self.block_2 = ResnetBlock(channels, channels, config, conditioned)


class Level(nn.Module):
    """The blocks of one resolution, and the resampler (`downsample` or `upsample`) that leaves it."""

    def __init__(self, widths: list[int], config: KVAEConfig, conditioned: bool):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(i, o, config, conditioned) for i, o in pairwise(widths))


class Coder(nn.Module):
    """The part that encoder and decoder share: a sequence of stages, each of which runs on all frames of a segment."""

    conv_in: CausalConv3d
    conv_out: CausalConv3d
    norm_out: nn.Module
    gradient_checkpointing = False

    def stages(self) -> Iterator[nn.Module]:
        """Blocks and resamplers in the order in which they run."""
        raise NotImplementedError

    def full_resolution(self) -> tuple[ResnetBlock, ...]:
        """The blocks that run at the resolution of the pixels."""
        raise NotImplementedError

    def fold(self) -> None:
        """Prepare frozen weights to run: lay them out for their device, and fold those of the resamplers.

        What is done already, and has not changed since, stays as it is.
        """
        lay_out_weights(self.parameters())
        for module in self.modules():
            if isinstance(module, Resampler):
                module.fold()
        lay_out_weights(self.buffers())

    def run(self, h_BCTHW: Tensor, cache: Cache, *z: Tensor) -> Tensor:
        """Run all stages; the blocks are conditioned on z if it is given."""
        for stage in self.stages():
            inputs = (h_BCTHW, *z) if isinstance(stage, ResnetBlock) else (h_BCTHW,)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h_BCTHW = checkpointed(stage, cache, inputs)
            else:
                h_BCTHW = stage(inputs[0], cache, *inputs[1:])
        return h_BCTHW


class Encoder(Coder):
    """One segment of frames → mean and log-variance of its latents."""

    def __init__(self, config: KVAEConfig):
        super().__init__()
        widths = config.encoder_widths
        self.conv_in = CausalConv3d(3, widths[0], padding=config.padding)
        self.down = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            level = Level([before] + [width] * config.num_res_blocks, config, conditioned=False)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, time=i in config.temporal_levels, config=config)
            self.down.append(level)
            before = width * config.downsample_version
        self.mid = Mid(widths[-1], config, conditioned=False)
        self.norm_out = make_norm(widths[-1], config)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_channels, padding=config.padding)

    def stages(self) -> Iterator[nn.Module]:
        for level in self.down:
            yield from level.block  # type: ignore[misc]
            if hasattr(level, "downsample"):
                yield level.downsample  # type: ignore[misc]
        yield self.mid.block_1
        yield self.mid.block_2

    def full_resolution(self) -> tuple[ResnetBlock, ...]:
        return tuple(self.down[0].block)  # type: ignore[arg-type]

    def forward(self, x_B3THW: Tensor, cache: Cache) -> Tensor:
        """[B, 3, T, H, W] → [B, 2c, t, h, w], means first."""
        h = self.run(self.conv_in(x_B3THW, cache), cache)
        return self.conv_out(F.silu(self.norm_out(h)), cache)


class Decoder(Coder):
    """One segment of latents → its frames."""

    def __init__(self, config: KVAEConfig):
        super().__init__()
        widths = config.decoder_widths
        self.conv_in = CausalConv3d(config.z_channels, widths[-1], padding=config.padding)
        self.mid = Mid(widths[-1], config, conditioned=True)
        self.up = nn.ModuleList()  # from full resolution down, as in the checkpoint; run from the end
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level([before] + [width] * (config.num_res_blocks + 1), config, conditioned=True)
            if i > 0:
                level.upsample = Upsample(width, time=len(widths) - 1 - i in config.temporal_levels, config=config)
            self.up.append(level)
        self.norm_out = SpatialNorm(widths[0], config)
        self.conv_out = CausalConv3d(widths[0], 3, padding=config.padding)

    def stages(self) -> Iterator[nn.Module]:
        yield self.mid.block_1
        yield self.mid.block_2
        for level in reversed(self.up):
            yield from level.block  # type: ignore[misc]
            if hasattr(level, "upsample"):
                yield level.upsample  # type: ignore[misc]

    def full_resolution(self) -> tuple[ResnetBlock, ...]:
        return tuple(self.up[0].block)  # type: ignore[arg-type]

    def forward(self, z_Bcthw: Tensor, cache: Cache) -> Tensor:
        """[B, c, t, h, w] → [B, 3, T, H, W]; T is 4t − 3 at the start of a stream, 4t later on."""
        first = self.conv_in.name not in cache
        h = self.run(self.conv_in(z_Bcthw, cache), cache, z_Bcthw)
        return self.conv_out(F.silu(self.norm_out(h, z_Bcthw, first)), cache)


def checkpointed(stage: nn.Module, cache: Cache, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run a stage and recompute its activations for the gradient. Its cache passes through as tensors."""
    names = [module.name for module in stage.modules() if isinstance(module, Streamed)]
    before = {name: cache[name] for name in names if name in cache}

    def run(x_BCTHW: Tensor, past: Cache, *z: Tensor) -> tuple[Tensor, Cache]:
        memory = dict(past)
        return stage(x_BCTHW, memory, *z), memory

    y, after = checkpoint(run, inputs[0], before, *inputs[1:], use_reentrant=False)
    cache.update(after)
    return y
