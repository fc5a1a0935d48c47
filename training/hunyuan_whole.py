"""HunyuanVideo's VAE over whole clips, one layer after the other, each a few frames at a time.

diffusers computes clips of more than 17 frames in tiles. A tile does not see the frames before it, and its GroupNorms
see no other tile, so its latents differ from those of the whole clip. Here every layer runs over the whole clip before
the next one begins: the result is that of the whole network, but for rounding. Besides a few frames, two feature maps
are held at a time, and on the host if the device has no room for them.

# B batch, C channels, T frames, H/W rows and columns; first:stop frames
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kvae.engine.statistics import channel_moments, scale_and_shift
from ..serving.memory import free_memory
from .hunyuan_attention import attend_frame_by_frame

CHUNK = 1 << 25  # values of a feature map that a layer computes at once: 128 MB in float32
WORKSPACE = 8  # chunks in float32, at most, beside the feature maps: normalised, padded, the result, the kernel's own


def see_whole_clips(vae: Any) -> None:
    """Let an AutoencoderKLHunyuanVideo or AutoencoderKLHunyuanVideo15 encode and decode clips of any length whole.

    The latter has no tiles in time: only its attention changes. Names of weights stay. With gradients, diffusers' own
    layers compute the same.
    """
    for coder in (vae.encoder, vae.decoder):
        attend_frame_by_frame(coder)
    if not hasattr(vae, "use_framewise_encoding"):
        return
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    widths = sum(vae.config.block_out_channels[:2])
    vae.encoder.forward = partial(_forward, vae.encoder, vae.encoder.forward, lambda T, H, W: widths * T * H * W)
    vae.decoder.forward = partial(
        _forward, vae.decoder, vae.decoder.forward, lambda T, H, W: widths * (4 * T - 3) * 8 * H * 8 * W
    )


def _forward(coder: Any, plain: Any, values: Callable[[int, int, int], int], x_BCTHW: Tensor) -> Tensor:
    """The coder's result.

    Args:
        plain: diffusers' own forward.
        values: those of the two largest feature maps of a clip that are held at once, by the sides of x.
    """
    if torch.is_grad_enabled():
        return plain(x_BCTHW)
    needed = len(x_BCTHW) * values(*x_BCTHW.shape[2:]) * x_BCTHW.element_size() + 4 * WORKSPACE * CHUNK
    free = free_memory(x_BCTHW.device)
    fits = free is None or needed <= free
    if len(x_BCTHW) > 1 and not fits:
        return torch.cat([_forward(coder, plain, values, x_1CTHW) for x_1CTHW in x_BCTHW.split(1)])
    return _Layers(x_BCTHW.device, x_BCTHW.device if fits else torch.device("cpu")).coder(coder, x_BCTHW)


@dataclass(frozen=True)
class _Source:
    """What a convolution reads: `read(first, stop)` gives these frames on the device."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class _Layers:
    """The layers of the VAE, computed on `device`, over feature maps that lie on `store`."""

    device: torch.device
    store: torch.device

    def coder(self, coder: Any, x_BCTHW: Tensor) -> Tensor:
        x = self.convolution(coder.conv_in, self.stored(x_BCTHW))
        for block in getattr(coder, "down_blocks", ()):
            for resnet in block.resnets:
                x = self.residual(resnet, x)
            for down in block.downsamplers or ():
                x = self.convolution(down.conv, self.stored(x))
        middle = coder.mid_block
        x = self.residual(middle.resnets[0], x)
        for attention, resnet in zip(middle.attentions, list(middle.resnets)[1:], strict=True):
            if attention is not None:
                x = middle.attend(attention, x.to(self.device)).to(self.store)
            x = self.residual(resnet, x)
        for block in getattr(coder, "up_blocks", ()):
            for resnet in block.resnets:
                x = self.residual(resnet, x)
            for up in block.upsamplers or ():
                x = self.convolution(up.conv, self.upsampled(up.upsample_factor, x))
        return self.convolution(coder.conv_out, self.normed(coder.conv_norm_out, coder.conv_act, x)).to(self.device)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        """A residual block: x and its result are all that is held."""
        y = self.convolution(block.conv1, self.normed(block.norm1, block.nonlinearity, x))
        normed = self.normed(block.norm2, block.nonlinearity, y)

        def beside(first: int, stop: int) -> Tensor:
            frames = x[:, :, first:stop].to(self.device)
            return frames if block.conv_shortcut is None else block.conv_shortcut(frames)

        return self.convolution(block.conv2, normed, beside, y)

    def convolution(
        self,
        causal: Any,
        source: _Source,
        beside: Callable[[int, int], Tensor] | None = None,
        out_BCTHW: Tensor | None = None,
    ) -> Tensor:
        """All frames of a causal convolution, the last ones first: so the result may take the place of its source.

        Args:
            beside: frames to add to the result's.
            out_BCTHW: what to write to; it may be what the source reads.
        """
        *sides, before, _ = causal.time_causal_padding
        stride = causal.conv.stride[0]
        count = (source.shape[2] - 1) // stride + 1
        for first, stop in reversed(_chunks(count, stride * _frame(source.shape, causal.conv.out_channels))):
            earliest = stride * first - before
            x = source.read(max(0, earliest), stride * (stop - 1) + 1)
            y = causal.conv(F.pad(x, (*sides, max(0, -earliest), 0), mode=causal.pad_mode))
            if beside:
                y += beside(first, stop)
            if out_BCTHW is None:
                out_BCTHW = y.new_empty((*y.shape[:2], count, *y.shape[3:]), device=self.store)
            out_BCTHW[:, :, first:stop] = y
        assert out_BCTHW is not None, "a clip has a frame"
        return out_BCTHW

    def stored(self, x: Tensor) -> _Source:
        """A map as it is."""
        return _Source(x.shape, lambda first, stop: x[:, :, first:stop].to(self.device))

    def normed(self, norm: nn.GroupNorm, activation: nn.Module, x: Tensor) -> _Source:
        """A map, normalised over the whole clip, and activated."""
        chunks = _chunks(x.shape[2], _frame(x.shape))
        moments = [channel_moments(x[:, :, first:stop].to(self.device)) for first, stop in chunks]
        scale, shift = scale_and_shift(norm, moments, [stop - first for first, stop in chunks])

        def read(first: int, stop: int) -> Tensor:
            frames = x[:, :, first:stop].to(self.device)
            return activation(torch.addcmul(shift, frames, scale)).to(x.dtype)

        return _Source(x.shape, read)

    def upsampled(self, factor: tuple[int, int, int], x: Tensor) -> _Source:
        """A map with every value repeated in time, rows and columns; the first frame is not repeated in time."""
        t, h, w = factor
        B, C, T, H, W = x.shape

        def read(first: int, stop: int) -> Tensor:
            of = [-(-frame // t) for frame in range(first, stop)]
            frames = x[:, :, of].to(self.device)
            return frames.repeat_interleave(h, 3).repeat_interleave(w, 4)

        return _Source((B, C, t * (T - 1) + 1, h * H, w * W), read)


def _frame(shape: tuple[int, ...], channels: int = 0) -> int:
    """Values of a frame of a map, [B, C, T, H, W], or of one with more channels."""
    B, C, _, H, W = shape
    return prod((B, max(C, channels), H, W))


def _chunks(frames: int, values: int) -> list[tuple[int, int]]:
    """Bounds of as many frames as are computed at once, with this many values each."""
    step = max(1, CHUNK // values)
    return [(first, min(first + step, frames)) for first in range(0, frames, step)]
