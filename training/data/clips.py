"""The clips to extract: which clips of which videos, their frames, and the files of their pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ...kvae import WeightsError
from ..errors import UserError
from .pair_names import MIRRORED, PairNames
from .videos import Clip, cut, read_clips


class ClipOptions(Protocol):
    """The options of `extract` that say how clips are cut and resized."""

    max_clips: int
    clips_per_video: int
    mirror: str
    num_frames: int
    height: int
    width: int
    fit: str
    sampling: str


@dataclass(frozen=True)
class ClipTask:
    """A clip to extract into a pair file.

    Attributes:
        frames: uint8 [3, T, H, W]; None if the pair exists already, or if the clip failed.
        failure: why the clip failed; empty if it did not.
    """

    path: Path
    clip: Clip
    mirrored: bool = False
    frames: Tensor | None = None
    failure: str = ""


def clips_of_videos(videos: list[Path], options: ClipOptions) -> list[tuple[Path, int]]:
    """The videos to extract from, each with the largest number of clips to cut; together at most --max-clips."""
    if not options.max_clips:
        return [(video, options.clips_per_video) for video in videos]
    shares, left = [], options.max_clips
    for video in videos:
        if not left:
            break
        try:
            clips = min(left, len(cut(video, options.num_frames, options.clips_per_video)))
        except Exception:
            clips = 1  # it will fail again, and be reported
        shares.append((video, clips))
        left -= clips
    return shares


def pair_endings(options: ClipOptions) -> dict[str, bool]:
    """The endings of the names of a clip's pairs, each with whether that pair is mirrored."""
    return {"": False, MIRRORED: True} if options.mirror == "yes" else {"": False}


def read_tasks(video: Path, clips: int, names: PairNames, options: ClipOptions) -> Iterator[ClipTask]:
    """Yield the tasks of a video's first clips; the video is decoded once. Tasks whose pairs exist come first.

    An error ends the video: the last task then has the error as its `failure`.
    """
    missing: dict[Clip, list[ClipTask]] = {}
    try:
        for i, clip in enumerate(cut(video, options.num_frames, options.clips_per_video)[:clips]):
            clip = replace(clip, first=None) if options.sampling == "uniform" else clip
            for ending, mirrored in pair_endings(options).items():
                path, there = names.place(video, ending if options.clips_per_video == 1 else f".{i:03d}{ending}")
                task = ClipTask(path, clip, mirrored)
                if there:
                    yield task
                else:
                    missing.setdefault(clip, []).append(task)
        if missing:
            read = read_clips(list(missing), options.height, options.width, options.fit)
            for tasks, frames in zip(missing.values(), read, strict=True):
                for task in tasks:
                    yield replace(task, frames=frames.flip(-1) if task.mirrored else frames)
    except Exception as error:
        names_video = isinstance(error, UserError | WeightsError)
        failure = reason_of(error) if names_video else f"{video}: {reason_of(error)}"
        yield ClipTask(video, Clip(video, 0, 0), failure=failure)


def batched(tasks: Iterable[ClipTask], size: int) -> Iterator[list[ClipTask]]:
    """Batches of `size` tasks whose frames have one shape; tasks without frames come alone."""
    batch: list[ClipTask] = []
    for task in tasks:
        if task.frames is None:
            yield [task]
            continue
        if batch and task.frames.shape != batch[0].frames.shape:  # type: ignore[union-attr]
            yield batch
            batch = []
        batch.append(task)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def reason_of(error: Exception) -> str:
    """Why a clip gives no pair. For an unforeseen error, this includes its type."""
    return str(error) if isinstance(error, UserError | WeightsError) else f"{type(error).__name__}: {error}"
