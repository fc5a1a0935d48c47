"""The frames of a video as they are shown, by their place in it, whatever the file is.

    for picture in read_pictures("clip.mp4", range(580, 597)):
        print(fitted(picture, 240, 320).shape)  # uint8 [3, 240, 320]

Frames come as ffmpeg gives them: turned and mirrored, those shown and no others, colours by their tags, and besides
without the comb of interlacing. Only one is held at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ..kvae.errors import WeightsError
from .shown import Picture, as_shown, deinterlaced
from .video_index import Shown, seek, shown
from .video_stream import Decoded, opened

NEAR = 32  # frames that are decoded on the way rather than sought


class _Astray(Exception):
    """Behind a key frame there was not what was to be there."""


def read_pictures(path: str | os.PathLike, places: Sequence[int]) -> Iterator[Picture]:
    """The frames at these places, which rise; without those past the end of the video, and those that do not decode.

    Raises:
        WeightsError: not a video, or damaged.
    """
    if all(b - a <= NEAR for a, b in zip((-1, *places), places, strict=False)):
        yield from _in_order(path, places)
        return
    index = shown(path)
    if not index.times:
        yield from _in_order(path, places)
        return
    times = [index.times[place] for place in places if place < index.count]
    given = 0
    try:
        for picture in _by_time(path, times, index):
            yield picture
            given += 1
    except _Astray as astray:
        yield from _by_time(path, times[times.index(astray.args[0]) :], None)


def _in_order(path: str | os.PathLike, places: Sequence[int]) -> Iterator[Picture]:
    """By counting from the start."""
    wanted = iter(places)
    place = next(wanted, None)
    if place is None:
        return
    with opened(path) as stream:
        for i, (frame, _) in enumerate(deinterlaced(Decoded(path, stream))):
            if i == place:
                yield as_shown(frame, stream.sample_aspect_ratio)
                place = next(wanted, None)
            if place is None:
                return


def _by_time(path: str | os.PathLike, times: Sequence[int], index: Shown | None) -> Iterator[Picture]:
    """By the times at which they are shown; with an index, from the key frame before where that is still ahead.

    Raises:
        _Astray: the frame of this time was not behind the key frame.
    """
    with opened(path) as stream:
        frames, now = _Ahead(path, stream), index.times[0] if index else 0
        for time in times:
            key = index.key_before(time) if index else None
            sought = key is not None and key > now
            if sought:
                frames = _Ahead(path, stream, key)
            try:
                frame = frames.at(time)
            except WeightsError:  # what is marked as a key frame may be none
                if not sought:
                    raise
                frame = None
            if frame is not None:
                yield as_shown(frame, stream.sample_aspect_ratio)
            elif sought:
                raise _Astray(time)
            now = time


class _Ahead:
    """The frames of a stream from a key frame on, or from the start."""

    def __init__(self, path: str | os.PathLike, stream: Any, key: int | None = None):
        there = key is None or seek(stream, key)
        self.frames = deinterlaced(Decoded(path, stream)) if there else iter(())
        self.held: list[tuple[Any, int | None]] = []

    def at(self, time: int) -> Any:
        """The frame of that time; None where there is none. What comes before it is gone then."""
        for frame, found in chain(self.held, self.frames):
            self.held = []
            if found == time:
                return frame
            if found is not None and found > time:
                self.held = [(frame, found)]
                break
        return None
