"""Write the clips of a batch, as they are decoded, into a file or a folder of pictures each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from .clips import cut_clip


class ClipWriter(Protocol):
    """Takes the frames of a clip, [T, H, W, 3] in 0..1, as a VideoWriter does."""

    def write(self, frames_THW3: Tensor) -> None: ...


def write_clips(
    segments: Iterator[Tensor],
    clips: int,
    decoded: int,
    kept: int,
    new_file: Callable[[int], AbstractContextManager[ClipWriter]],
) -> None:
    """Write the first `kept` frames of each clip into its file.

    Args:
        segments: [T, H, W, 3] in 0..1, of clips with `decoded` frames each.
        new_file: makes the file of a clip, by its number. The first is made before a segment is asked for, each other
            one after the file before it is complete.

    Raises:
        What making a file, a segment or writing raises. The files of the clips before are complete.
    """
    for clip in range(clips):
        with new_file(clip) as writer:
            for frames in cut_clip(segments, decoded, kept):
                writer.write(frames)
    deque(segments, maxlen=0)  # a segment is reported as done when the next one is asked for
