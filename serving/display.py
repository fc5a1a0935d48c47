"""Decoded frames as a player displays them: deinterlaced, with colours by their tags, rotated and mirrored.

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

LIMITED, FULL = 1, 2  # colour ranges, by FFmpeg's numbers
BT709, BT601 = 1, 5  # colour matrices, by libswscale's numbers, most of which are those of ITU-T H.273
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}


@dataclass(frozen=True)
class Picture:
    """A frame as displayed. A pixel is `pixel_aspect` times as wide as it is high."""

    rgb: np.ndarray
    pixel_aspect: Fraction = Fraction(1)


def to_picture(frame: Any, pixel_aspect: Fraction | None) -> Picture:
    """The picture of an av.VideoFrame. `pixel_aspect` is that of the stored frame, before its rotation."""
    rgb = _rgb(frame)
    aspect = pixel_aspect if pixel_aspect else Fraction(1)
    try:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"]))
    except (KeyError, struct.error):
        return Picture(rgb, aspect)
    return apply_display_matrix(Picture(rgb, aspect), a, b, c, d)


def apply_display_matrix(picture: Picture, a: int, b: int, c: int, d: int) -> Picture:
    """Rotate and mirror by a display matrix: x' = ax + cy, y' = bx + dy, rounded to the nearest quarter turn."""
    rgb, aspect = picture.rgb, picture.pixel_aspect
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb, aspect, a, d = rgb.swapaxes(0, 1), 1 / aspect, c, b
    if a < 0:
        rgb = rgb[:, ::-1]
    if d < 0:
        rgb = rgb[::-1]
    return Picture(np.ascontiguousarray(rgb), aspect)


def _rgb(frame: Any) -> np.ndarray:
    """The frame as RGB. Without tags the matrix is BT.601's and the range is limited, as in FFmpeg.

    PyAV converts by the tags only from version 17 on, and only if a frame has tags, so every argument is given. Older
    versions ignore the arguments if both matrices are equal. RGB has no matrix, so any other one may be given for it.
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


def deinterlace(frames: Iterable[Any]) -> Iterator[Any]:
    """Yield (av.VideoFrame, pts) for each frame. Interlaced ones keep the first field; the other is interpolated.

    The filter needs the frames before and after for that, so reading is one frame ahead.
    """
    filtering: _Deinterlacer | None = None
    last = None
    for frame in frames:
        if filtering and not filtering.accepts(frame):
            yield from filtering.end()
            filtering = None
        if filtering is None and frame.interlaced_frame:
            filtering = _Deinterlacer(frame)
            if last is not None and filtering.accepts(last):
                filtering.start_after(last)
        if filtering:
            yield from filtering.push(frame)
        else:
            yield frame, frame.pts
        last = frame
    if filtering:
        yield from filtering.end()


class _Deinterlacer:
    """libavfilter's bwdif filter for frames of one size and format."""

    def __init__(self, frame: Any):
        self.kind, self.waiting, self.skipped = self._kind(frame), deque[int | None](), 0
        self.graph = av.filter.Graph()
        source = self.graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        bwdif, sink = self.graph.add("bwdif", "mode=send_frame:deint=interlaced"), self.graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        self.graph.configure()

    def accepts(self, frame: Any) -> bool:
        return self._kind(frame) == self.kind

    def start_after(self, frame: Any) -> None:
        """Give the filter the frame before its first one. It is not yielded again."""
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
