"""Clips of one shape → their pairs, by both VAEs."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from ...kvae import padded_frames
from ..vaes import VideoVAE
from .clips import ClipTask
from .pairs import Pair, Source
from .transfer import to_device, to_host

PendingPair = Callable[[], Pair]  # waits until the latents of a pair are on the host


class EncodeOptions(Protocol):
    """The options of `extract` that say how clips are encoded and what is said of them."""

    height: int
    width: int
    fit: str
    posterior: str
    seed: int


def encode_clips(
    tasks: list[ClipTask], root: Path, vaes: tuple[VideoVAE, VideoVAE], options: EncodeOptions, device: torch.device
) -> list[PendingPair]:
    """Encode clips of one shape; latents are kept as float16.

    Args:
        root: folder of the videos.
        vaes: of z_h and z_k.
    """
    generator = None
    if options.posterior == "sample":
        clip = tasks[0].clip
        key = f"{options.seed} {clip.video.relative_to(root).as_posix()} {clip.first}"
        seed = zlib.crc32(key.encode(errors="surrogatepass"))
        generator = torch.Generator(device).manual_seed(seed)
    frames = to_device(torch.stack([task.frames for task in tasks]), device)  # type: ignore[misc]
    latents = to_host([vae.encode(frames, generator).half() for vae in vaes])

    def pair(i: int) -> Pair:
        z_h, z_k = latents()
        return Pair(z_h[i], z_k[i], _source(tasks[i], root, options))

    return [partial(pair, i) for i in range(len(tasks))]


def _source(task: ClipTask, root: Path, options: EncodeOptions) -> Source:
    count = task.frames.shape[1]  # type: ignore[union-attr]
    return Source(
        video=task.clip.video.relative_to(root).as_posix(),
        first=task.clip.first,
        frames=count,
        padded=padded_frames(count) - count,
        height=options.height,
        width=options.width,
        mirrored=task.mirrored,
        fit=options.fit,
    )
