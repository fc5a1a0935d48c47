"""The parts of a VAE whose latents stand for 4x16x16 pixels, each trained alone beside principal components.

    pixels ─fine-encoder→ middle ─coarse-encoder→ latents ─coarse-decoder→ middle ─level-2→ ─level-1→ ─level-0→ pixels

A `LinearCodec` stands in for what comes before a part, another for what comes after it. So each part has a goal in
pixels from its first step on. The coarse parts have most of the weights but few positions, so their steps are cheap.
A KVAE's upsamplers repeat neighbours, and telling the copies apart is hard to learn: one level at a time, it takes
minutes.

# level 0 has the pixels, level 1 the blocks of 2x2, level 2 of 4x4, and level 3, the middle, of 8x8; h_BCTHW
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kvae import KVAE
from ...kvae.layers import ResnetBlock
from .components import LinearCodec, fit_codec

MIDDLE = 3
LEVELS = ("level-0", "level-1", "level-2")
PARTS = ("fine-encoder", "coarse-encoder", "coarse-decoder", "coarse", *LEVELS)  # "coarse": encoder and decoder
ENCODES = ("coarse-encoder", "coarse")


class Parts(Protocol):
    """A VAE, cut into its parts.

    Attributes:
        frames: that a position of each level stands for, from level 0 on.
        encoder_width: channels of the encoder's middle.
        encoder_fold: 2 if those are of 2x2x2 blocks side by side, each made in the same way; else 1.
        decoder_widths: channels of the decoder's levels, from level 0 on.
    """

    frames: Sequence[int]
    encoder_width: int
    encoder_fold: int
    decoder_widths: Sequence[int]

    def fine_encoder(self, x_B3THW: Tensor) -> Tensor:
        """Pixels → the middle."""

    def coarse_encoder(self, h_BCTHW: Tensor) -> Tensor:
        """The middle → mean and log-variance of the latents, side by side, [B, 2c, t, h, w]."""

    def coarse_decoder(self, z_Bcthw: Tensor) -> Tensor:
        """Latents → the middle."""

    def up(self, level: int, h_BCTHW: Tensor, z_Bcthw: Tensor) -> Tensor:
        """The level after this one, with the latents, → this level; level 0 gives pixels."""


class KVAEParts(Parts):
    """KVAE-3D-2.0-t4s16. The norms of its decoder see the latents at every level."""

    frames = (1, 1, 2, 4)
    encoder_fold = 1

    def __init__(self, vae: KVAE):
        self.encoder: Any = vae.encoder
        self.decoder: Any = vae.decoder
        self.encoder_width = 2 * vae.config.encoder_widths[MIDDLE - 1]
        self.decoder_widths = vae.config.decoder_widths
        self.cut = self.encoder.down[MIDDLE - 1].downsample

    def fine_encoder(self, x_B3THW: Tensor) -> Tensor:
        stages = list(self.encoder.stages())
        return _run(stages[: stages.index(self.cut) + 1], self.encoder.conv_in(x_B3THW, {}))

    def coarse_encoder(self, h_BCTHW: Tensor) -> Tensor:
        stages = list(self.encoder.stages())
        h = _run(stages[stages.index(self.cut) + 1 :], h_BCTHW)
        return self.encoder.conv_out(F.silu(self.encoder.norm_out(h)), {})

    def coarse_decoder(self, z_Bcthw: Tensor) -> Tensor:
        stages = list(self.decoder.stages())
        end = stages.index(self.decoder.up[MIDDLE].upsample)
        return _run(stages[:end], self.decoder.conv_in(z_Bcthw, {}), z_Bcthw)

    def up(self, level: int, h_BCTHW: Tensor, z_Bcthw: Tensor) -> Tensor:
        h = self.decoder.up[level + 1].upsample(h_BCTHW, {})
        h = _run(self.decoder.up[level].block, h, z_Bcthw)
        return h if level else self.decoder.conv_out(F.silu(self.decoder.norm_out(h, z_Bcthw, True)), {})


class Hunyuan15Parts(Parts):
    """diffusers' AutoencoderKLHunyuanVideo15."""

    frames = (1, 1, 1, 2)
    encoder_fold = 2

    def __init__(self, vae: Any):
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.decoder_widths = vae.config.block_out_channels
        self.encoder_width = self.decoder_widths[MIDDLE]

    def fine_encoder(self, x_B3THW: Tensor) -> Tensor:
        return _apply(self.encoder.down_blocks[:MIDDLE], self.encoder.conv_in(x_B3THW))

    def coarse_encoder(self, h_BCTHW: Tensor) -> Tensor:
        h = self.encoder.mid_block(_apply(self.encoder.down_blocks[MIDDLE:], h_BCTHW))
        shortcut = h.unflatten(1, (-1, self.encoder.group_size)).mean(2)
        return self.encoder.conv_out(F.silu(self.encoder.norm_out(h))) + shortcut

    def coarse_decoder(self, z_Bcthw: Tensor) -> Tensor:
        h = self.decoder.conv_in(z_Bcthw) + z_Bcthw.repeat_interleave(self.decoder.repeat, dim=1)
        h = _apply(self.decoder.up_blocks[: -MIDDLE - 1], self.decoder.mid_block(h))
        return _apply(self.decoder.up_blocks[-MIDDLE - 1].resnets, h)

    def up(self, level: int, h_BCTHW: Tensor, z_Bcthw: Tensor) -> Tensor:
        before, block = self.decoder.up_blocks[-level - 2], self.decoder.up_blocks[-level - 1]
        h = _apply(chain(before.upsamplers, block.resnets), h_BCTHW)
        return h if level else self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))


def _run(stages: Iterable[Callable[..., Tensor]], h: Tensor, *z: Tensor) -> Tensor:
    """Run stages of a KVAE on the start of a stream; its blocks are conditioned on z if it is given."""
    for stage in stages:
        h = stage(h, {}, *z) if isinstance(stage, ResnetBlock) else stage(h, {})
    return h


def _apply(modules: Iterable[Callable[[Tensor], Tensor]], h: Tensor) -> Tensor:
    for module in modules:
        h = module(h)
    return h


class Neighbours:
    """The codecs that stand in for a part's neighbours.

    Args:
        sample: training clips, [B, 3, T, H, W] in −1..1, that the principal components are fitted to.
        side: pixels (rows and columns) that a latent stands for.
        channels: of the latents.
        generator: decides the rotations of the components.
    """

    def __init__(self, parts: Parts, sample: Sequence[Tensor], side: int, channels: int, generator: torch.Generator):
        def codec(frames: int, side: int, channels: int, fold: int = 1) -> LinearCodec:
            return fit_codec(sample, frames, side, channels, generator, fold)

        n = parts.encoder_fold
        self.parts = parts
        self.latents = codec(4, side, channels)
        self.encoder_middle = codec(parts.frames[MIDDLE] // n, 2**MIDDLE // n, parts.encoder_width, n)
        self.levels = [codec(parts.frames[i], 2**i, parts.decoder_widths[i]) for i in range(1, MIDDLE + 1)]

    def encode(self, x_B3THW: Tensor) -> Tensor:
        """Pixels → mean and log-variance of the latents, [B, 2c, t, h, w], by the coarse encoder."""
        return self.parts.coarse_encoder(self.encoder_middle.encode(x_B3THW))

    def decode(self, part: str, x_B3THW: Tensor, z_Bcthw: Tensor) -> Tensor:
        """Pixels x, after a part and its neighbours, from latents z where the way leads through those.

        The first frame can come several times: a block of several frames must have it in all of them.
        """
        if part == "fine-encoder":
            return self.encoder_middle.decode(self.parts.fine_encoder(x_B3THW))
        if part == "coarse-encoder":
            return self.latents.decode(z_Bcthw)
        if part in LEVELS:
            level = LEVELS.index(part)
            h = self.parts.up(level, self.levels[level].encode(x_B3THW), z_Bcthw)
            return self.levels[level - 1].decode(h) if level else h
        return self.levels[-1].decode(self.parts.coarse_decoder(z_Bcthw))
