"""Encode or decode one clip of a batch, down the ladder if memory runs out.

Each try begins at the first segment, since a failed one leaves no state to go on with.

# x_13THW pixels in HunyuanVideo's −1..1, z_1cthw raw latents of the host's space, on the device of the weights
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..adapters.hybrid import HybridVAE, from_kvae_pixels
from ..kvae.engine.tiles import Part
from .ladder import Ladder
from .memory import with_less_memory
from .to_host import to_host

Chunks = Callable[[], Iterable[Tensor]]  # makes the pixels of a clip, [1, 3, n, H, W], cut anywhere in time, anew
Report = Callable[[int], None]  # called with the number of latent frames of the clip that are done
Show = Callable[[Tensor], None]  # called with new frames of the whole picture, [1, 3, n, H, W]; not to be kept


def encode_clip(vae: HybridVAE, x_13THW: Tensor, ladder: Ladder, report: Report) -> Tensor:
    """Raw latents [1, c, t, h, w], on the device and in the dtype of the weights.

    Args:
        x_13THW: 4n + 1 frames, on any device and in any dtype.

    Raises:
        WeightsError: the adapter for encoding is missing.
        torch.OutOfMemoryError: not even the last rung of the ladder fits.
    """
    config = vae.kvae.config
    side, t = config.spatial_factor, (x_13THW.shape[2] - 1) // config.temporal_compress_times + 1

    def work() -> Iterator[Tensor]:
        x = vae.kvae_pixels(_placed(vae, x_13THW))
        z = x.new_zeros(1, config.z_channels, t, *(-(-n // side) for n in x.shape[3:]))
        done, tiles = 0, prod(ladder.plan.execution.tiles)
        for part in ladder.watch(vae.kvae.encode_parts(x, ladder.execution)):
            part.put(z)
            done += part.x.shape[2]
            report(done // tiles)
        report(t)
        yield vae.from_kvae(z)

    (z,) = with_less_memory(work, ladder.step_down)
    return z


def encode_clip_stream(vae: HybridVAE, chunks: Chunks, ladder: Ladder, report: Report) -> Tensor:
    """As `encode_clip`, of a clip whose pixels come chunk by chunk: two segments of them are held at most.

    Args:
        ladder: of plans without tiles.
    """

    def work() -> Iterator[Tensor]:
        latents: list[Tensor] = []
        pixels = (vae.kvae_pixels(_placed(vae, x)) for x in chunks())
        for posterior in ladder.watch(vae.kvae.encode_stream(pixels, ladder.execution)):
            latents.append(posterior.mean.clone())  # which is half of a tensor that is not needed
            report(sum(z.shape[2] for z in latents))
        yield vae.from_kvae(torch.cat(latents, dim=2))

    (z,) = with_less_memory(work, ladder.step_down)
    return z


def decode_clip(
    vae: HybridVAE, z_1cthw: Tensor, x_13THW: Tensor, ladder: Ladder, report: Report, show: Show, pinned: bool
) -> None:
    """Write all frames into x_13THW, float32 on any device.

    Args:
        show: gets each frame once, whatever fails; none of a clip in tiles.
        pinned: whether frames go to the host through pinned memory (see `to_host`).

    Raises:
        WeightsError: the adapter for decoding is missing.
        torch.OutOfMemoryError: not even the last rung of the ladder fits.
    """
    shown = 0

    def work() -> Iterator[None]:
        nonlocal shown
        if ladder.plan.execution.overlap is not None:
            x_13THW.zero_()  # tiles that overlap are added up
        done, tiles = 0, prod(ladder.plan.execution.tiles)
        for part in _decoded(vae, z_1cthw, ladder, pinned):
            part.put(x_13THW)
            done += part.x.shape[2]
            if tiles == 1 and done > shown:
                show(part.x[:, :, shown - done :])
                shown = done
            del part  # before the next one is computed
            report(_latents(vae, done // tiles))
            yield
        report(z_1cthw.shape[2])

    deque(with_less_memory(work, ladder.step_down), maxlen=0)


def decode_clip_stream(
    vae: HybridVAE, z_1cthw: Tensor, ladder: Ladder, report: Report, show: Show, pinned: bool
) -> Iterator[Tensor]:
    """Yield the frames of each segment in turn, [1, 3, 17 or 16, H, W]; each frame once, whatever fails.

    Args:
        show: gets the frames before they are yielded.
        pinned: whether frames go to the host through pinned memory; otherwise they stay on the device.

    Raises:
        WeightsError, torch.OutOfMemoryError: as `decode_clip`.
    """
    sent = 0

    def work() -> Iterator[Tensor]:
        nonlocal sent
        for part in _decoded(vae, z_1cthw, ladder, pinned, skip=sent):
            sent = part.where[2].stop
            show(part.x)
            yield part.x.clone() if pinned else part.x  # a pinned buffer is used again
            del part  # before the next one is computed
            report(_latents(vae, sent))

    return with_less_memory(work, ladder.step_down)


def _decoded(vae: HybridVAE, z_1cthw: Tensor, ladder: Ladder, pinned: bool, skip: int = 0) -> Iterator[Part]:
    """The parts of a decoded clip, float32, without the first `skip` frames; on the host if `pinned`."""
    z = _placed(vae, z_1cthw)
    computed = ladder.watch(vae.decode_parts(z, ladder.execution))
    parts = filter(None, map(partial(_frames, skip=skip), computed))  # which hold no part while the next is computed
    return to_host(parts, z.device) if pinned else parts


def _frames(part: Part, skip: int) -> Part | None:
    """A part of KVAE's frames in the host's convention, float32, without the first `skip` frames of the clip."""
    batch, channels, time, *picture = part.where
    if time.stop <= skip:
        return None
    start = max(skip, time.start)
    x = from_kvae_pixels(part.x[:, :, start - time.start :])
    return replace(part, x=x, where=(batch, channels, slice(start, time.stop), *picture))


def _placed(vae: HybridVAE, x: Tensor) -> Tensor:
    """x on the device and in the dtype of the weights."""
    return x.to(next(vae.kvae.parameters()))


def _latents(vae: HybridVAE, frames: int) -> int:
    return -(-frames // vae.kvae.config.temporal_compress_times)
