"""A decoded frame as it is shown: its fields woven, its colours as tagged, turned and mirrored.

# pictures are uint8 [H, W, 3], RGB, full range
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np

LIMITED, FULL = 1, 2  # ranges, by FFmpeg's numbers
BT709, BT601 = 1, 5  # matrices, by libswscale's numbers, which are those of ITU-T H.273 where it has one
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}


@dataclass(frozen=True)
class Picture:
    """A frame as shown. A pixel is `pixel_aspect` times as wide as it is high."""

    rgb: np.ndarray
    pixel_aspect: Fraction = Fraction(1)


def as_shown(frame: Any, pixel_aspect: Fraction | None) -> Picture:
    """The picture of an av.VideoFrame, whose pixels have that shape before it is turned."""
    rgb = _rgb(frame)
    aspect = pixel_aspect if pixel_aspect else Fraction(1)
    try:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"]))
    except (KeyError, struct.error):
        return Picture(rgb, aspect)
    return turned(Picture(rgb, aspect), a, b, c, d)


def turned(picture: Picture, a: int, b: int, c: int, d: int) -> Picture:
    """Placed by a display matrix: x' = ax + cy, y' = bx + dy. Other angles are taken for the nearest quarter turn."""
    rgb, aspect = picture.rgb, picture.pixel_aspect
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb, aspect, a, d = rgb.swapaxes(0, 1), 1 / aspect, c, b
    if a < 0:
        rgb = rgb[:, ::-1]
    if d < 0:
        rgb = rgb[::-1]
    return Picture(np.ascontiguousarray(rgb), aspect)


def _rgb(frame: Any) -> np.ndarray:
    """Without a tag the matrix is BT.601's and the range limited, as in FFmpeg.

    PyAV converts by the tags only from 17 on, and not when frames come with none: so all is named. Older ones heed that
    only where the two matrices differ; RGB has none, so any other will do.
    """
    full = frame.color_range == FULL or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    matrix = _MATRICES.get(frame.colorspace, BT601)
    picture = frame.reformat(
        format="rgb24",
        interpolation="BICUBIC",
        src_colorspace=matrix,
        dst_colorspace=BT709 if matrix == BT601 else BT601,
        src_color_range=FULL if full else LIMITED,
        dst_color_range=FULL,
    )
    return picture.to_ndarray()


def deinterlaced(frames: Iterable[Any]) -> Iterator[Any]:
    """The frames one for one, as (av.VideoFrame, pts); of interlaced ones the first field, with rows filled in between.

    The frame before and the one after count, so that one frame more is read than is given.
    """
    weave: _Weave | None = None
    last = None
    for frame in frames:
        if weave and not weave.takes(frame):
            yield from weave.end()
            weave = None
        if weave is None and frame.interlaced_frame:
            weave = _Weave(frame)
            if last is not None and weave.takes(last):
                weave.look_back(last)
        if weave:
            yield from weave.push(frame)
        else:
            yield frame, frame.pts
        last = frame
    if weave:
        yield from weave.end()


class _Weave:
    """libavfilter's bwdif, for frames of one size and format."""

    def __init__(self, frame: Any):
        self.kind, self.waiting, self.skipped = self._kind(frame), deque[int | None](), 0
        self.graph = av.filter.Graph()
        source = self.graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        weave, sink = self.graph.add("bwdif", "mode=send_frame:deint=interlaced"), self.graph.add("buffersink")
        source.link_to(weave)
        weave.link_to(sink)
        self.graph.configure()

    def takes(self, frame: Any) -> bool:
        return self._kind(frame) == self.kind

    def look_back(self, frame: Any) -> None:
        """A frame that has been given already, before the first."""
        self.skipped = 1
        self.graph.push(frame)

    def push(self, frame: Any) -> Iterator[tuple[Any, int | None]]:
        self.waiting.append(frame.pts)
        self.graph.push(frame)
        yield from self._pull()

    def end(self) -> Iterator[tuple[Any, int | None]]:
        self.graph.push(None)
        yield from self._pull()

    def _pull(self) -> Iterator[tuple[Any, int | None]]:
        while True:
            try:
                frame = self.graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            if self.skipped:
                self.skipped -= 1
            else:
                yield frame, self.waiting.popleft()

    @staticmethod
    def _kind(frame: Any) -> tuple:
        return frame.width, frame.height, frame.format.name, frame.time_base
