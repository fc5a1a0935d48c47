"""Which frames of a clip make up each item of musubi-tuner.

Rules are those of musubi-tuner 0.3.4 (dataset/image_video_dataset.py and load_video in dataset/media_utils.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import CHUNK, FULL, HEAD, SLIDE, UNIFORM, Dataset

TARGET_FPS = 24.0  # of HunyuanVideo, HunyuanVideo 1.5 and Kandinsky 5
LATENT_FRAMES = 4


@dataclass(frozen=True, order=True)
class Window:
    """`frames` frames of a clip from `start` on, counted after its frame rate was fitted."""

    start: int
    frames: int

    @property
    def stop(self) -> int:
        return self.start + self.frames


def used_frames(count: int, dataset: Dataset) -> Sequence[int]:
    """The positions in a file of `count` frames of those that are used.

    Without source_fps, which is never read from the file, these are all; with it, frames are dropped, never doubled.
    """
    end = max(dataset.target_frames) if extraction_of(dataset) == HEAD else count
    if dataset.source_fps is None:
        return range(min(count, end))
    used, place, last, step = [], 0.0, -1, TARGET_FPS / dataset.source_fps
    for position in range(count):
        target = int(place)
        place += step
        if target == last:
            continue
        if target >= end and extraction_of(dataset) == HEAD:
            break
        last = target
        used.append(position)
    return used


def windows_of(count: int, dataset: Dataset) -> list[Window]:
    """The windows of a clip with `count` used frames, each once; none if it is shorter than every target."""
    if extraction_of(dataset) == FULL:
        longest = min(count, dataset.max_frames)
        return [Window(0, (longest - 1) // LATENT_FRAMES * LATENT_FRAMES + 1)] if count else []
    windows = [
        Window(start, frames)
        for frames in dataset.target_frames
        if count >= frames
        for start in _starts(count, frames, dataset)
    ]
    return list(dict.fromkeys(windows))


def extraction_of(dataset: Dataset) -> str:
    """frame_extraction; "head" for "uniform" with one sample."""
    return HEAD if dataset.frame_extraction == UNIFORM and dataset.frame_sample == 1 else dataset.frame_extraction


def _starts(count: int, frames: int, dataset: Dataset) -> list[int]:
    last = count - frames
    if extraction_of(dataset) == CHUNK:
        return list(range(0, last + 1, frames))
    if extraction_of(dataset) == SLIDE:
        return list(range(0, last + 1, dataset.frame_stride))
    if extraction_of(dataset) == UNIFORM:
        return np.linspace(0, last, dataset.frame_sample, dtype=int).tolist()
    return [0]
