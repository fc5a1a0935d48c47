"""Read frames of a video by their positions, as a player shows them.

    for picture in read_pictures("clip.mp4", range(580, 597)):
        print(fit_picture(picture, 240, 320).shape)  # uint8 [3, 240, 320]

Frames are those that ffmpeg gives: rotated and mirrored, without hidden frames, with colours by their tags. In
addition they are deinterlaced. Only one frame is held at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ..kvae.errors import WeightsError
from .display import Picture, deinterlace, to_picture
from .video_index import VideoIndex, index_video, seek
from .video_stream import FrameDecoder, open_video

NEAR = 32  # frames: a shorter gap is decoded, a longer one is skipped by seeking


class _SeekMissed(Exception):
    """The frame at the indexed time did not follow its key frame. The argument is the time."""


def read_pictures(path: str | os.PathLike, positions: Sequence[int]) -> Iterator[Picture]:
    """Read the frames at these positions, in rising order. Positions past the end and frames that do not decode are
    left out.

    Raises:
        WeightsError: not a video, or damaged.
    """
    if all(b - a <= NEAR for a, b in zip((-1, *positions), positions, strict=False)):
        yield from _in_order(path, positions)
        return
    index = index_video(path)
    if not index.times:
        yield from _in_order(path, positions)
        return
    times = [index.times[position] for position in positions if position < index.count]
    try:
        yield from _by_time(path, times, index)
    except _SeekMissed as missed:
        yield from _by_time(path, times[times.index(missed.args[0]) :], None)


def _in_order(path: str | os.PathLike, positions: Sequence[int]) -> Iterator[Picture]:
    """The frames at these positions, counted from the start of the file."""
    wanted = iter(positions)
    position = next(wanted, None)
    if position is None:
        return
    with open_video(path) as stream:
        for i, (frame, _) in enumerate(deinterlace(FrameDecoder(path, stream))):
            if i == position:
                yield to_picture(frame, stream.sample_aspect_ratio)
                position = next(wanted, None)
            if position is None:
                return


def _by_time(path: str | os.PathLike, times: Sequence[int], index: VideoIndex | None) -> Iterator[Picture]:
    """The frames at these times.

    Args:
        index: for seeking to the last key frame before each time, if that is still ahead. None: without seeking.

    Raises:
        _SeekMissed: the frame at a time did not follow its key frame.
    """
    with open_video(path) as stream:
        frames, now = _FrameSearch(path, stream), index.times[0] if index else 0
        for time in times:
            key = index.key_before(time) if index else None
            sought = key is not None and key > now
            if sought:
                frames = _FrameSearch(path, stream, key)
            try:
                frame = frames.at(time)
            except WeightsError:  # a packet marked as a key frame may not be one
                if not sought:
                    raise
                frame = None
            if frame is not None:
                yield to_picture(frame, stream.sample_aspect_ratio)
            elif sought:
                raise _SeekMissed(time)
            now = time


class _FrameSearch:
    """Frames of a stream, searched forward from a key frame, or from the start."""

    def __init__(self, path: str | os.PathLike, stream: Any, key: int | None = None):
        there = key is None or seek(stream, key)
        self.frames = deinterlace(FrameDecoder(path, stream)) if there else iter(())
        self.held: list[tuple[Any, int | None]] = []

    def at(self, time: int) -> Any:
        """The frame at that time, or None. Earlier frames cannot be found afterwards."""
        for frame, found in chain(self.held, self.frames):
            self.held = []
            if found == time:
                return frame
            if found is not None and found > time:
                self.held = [(frame, found)]
                break
        return None
