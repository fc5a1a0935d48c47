"""Which frames of a video are shown, and when. The counts in headers may be too high or too low.

In most files the packets tell, without being decoded: each holds the time at which its frame is shown, or a mark that
the frame is not shown. The index is checked against decoded frames at the start and at the end of the file. If they
disagree, the whole file is decoded.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import av

from ..kvae.errors import WeightsError
from ..kvae.paths import check_regular
from .video_stream import FrameDecoder, open_video, packets

CHECKED = 48  # frames from the start: more than a codec holds back
COMPLETE = 0.9  # of the stated duration: a file that ends earlier is cut short
HIDDEN = ("vp8",)  # codecs whose packets may hold frames that are never shown


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video in the order in which they are shown.

    Attributes:
        times: the time of each frame, in ticks; empty if the file has none.
        keys: the times of the key frames, at which decoding can begin, in order.
        tick: the unit of times, in seconds.
        count: number of frames.
        rate: frames per second.
        back: key frames to seek back by: 1, or 2 if a seek lands after the key frame that it asks for.
        lost: why the file is not complete; "" if it is.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...]
    tick: Fraction
    count: int
    rate: Fraction
    back: int = 1
    lost: str = ""

    def seconds(self, i: int) -> Fraction:
        """The time of frame i, in seconds after the first frame."""
        if not self.times:
            return i / self.rate
        steady = i / self.rate  # Matroska's times are rounded to milliseconds
        exact = (self.times[i] - self.times[0]) * self.tick
        return steady if abs(steady - exact) <= self.tick else exact

    def key_before(self, time: int) -> int | None:
        """Where to seek for the frame at `time` and the one before it: the time of a key frame; None is the start."""
        at = bisect_left(self.keys, time) - self.back
        return self.keys[at] if at >= 0 else None


def index_video(path: str | os.PathLike) -> VideoIndex:
    """Index the frames of a video file. The last 64 indexes are kept.

    Raises:
        WeightsError: as `open_video` and `FrameDecoder`.
    """
    check_regular(path)
    state = os.stat(path)
    return _index(os.fspath(path), state.st_mtime_ns, state.st_size)


@lru_cache(64)
def _index(path: str, *_state: int) -> VideoIndex:
    index = _demuxed(path)
    if index.times and _agrees_at_start(path, index):
        for back in (1, 2):
            index = replace(index, back=back)
            if _agrees_at_end(path, index):
                return index
    return _decoded(path, index)


def _demuxed(path: str) -> VideoIndex:
    """The index that the packets give; without times if a packet has none, or two have the same."""
    times: list[int | None] = []
    keys, end = [], Fraction(0)
    with open_video(path) as stream:
        container, tick = stream.container, stream.time_base
        start = Fraction(container.start_time or 0, 1_000_000)
        for packet in packets(container):
            at = packet.pts if packet.pts is not None else packet.dts
            if at is not None and packet.stream.type in ("video", "audio", "subtitle"):
                end = max(end, (at + (packet.duration or 0)) * packet.time_base - start)
            if packet.stream.index == stream.index and packet.size and not packet.is_discard:
                times.append(packet.pts)
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(packet.pts)
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        stated = Fraction(container.duration or 0, 1_000_000)
        if container.format.name == "avi":  # FFmpeg reports the duration of the packets it finds
            stated = max(stated, stream.frames / rate)
        told = stream.codec_context.name not in HIDDEN and None not in times and len(set(times)) == len(times)
    missing = end < COMPLETE * stated
    lost = f"cut short, it ends after {float(end):.2f} of {float(stated):.2f} seconds" if missing else ""
    known = tuple(sorted(time for time in times if time is not None)) if told else ()
    return VideoIndex(known, tuple(sorted(keys)), tick, len(known), rate, lost=lost)


def _agrees_at_start(path: str, index: VideoIndex) -> bool:
    """Whether the first decoded frames have the indexed times."""
    with open_video(path) as stream:
        start = [frame.pts for frame in islice(FrameDecoder(path, stream), CHECKED)]
    return start == list(index.times[:CHECKED])


def _agrees_at_end(path: str, index: VideoIndex) -> bool:
    """Whether the last decoded frames, from a key frame on, have the indexed times."""
    end = index.times[-1]
    key = index.key_before(end)
    with open_video(path) as stream:
        if key is not None and not seek(stream, key):
            return False
        key = max((time for time in index.keys if time < end), default=index.times[0])
        try:
            found = [frame.pts for frame in FrameDecoder(path, stream) if frame.pts is None or frame.pts >= key]
        except WeightsError:  # the packet marked as a key frame is not one
            return False
    return found == [time for time in index.times if time >= key]


def seek(stream: Any, time: int) -> bool:
    """Seek to the key frame at or before `time`. Returns whether the file can seek."""
    try:
        stream.container.seek(time, stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


def _decoded(path: str, index: VideoIndex) -> VideoIndex:
    """The index that decoding the whole file gives."""
    times: list[int | None] = []
    keys = []
    with open_video(path) as stream:
        for frame in FrameDecoder(path, stream):
            times.append(frame.pts)
            if frame.key_frame and frame.pts is not None:
                keys.append(frame.pts)
    known = [time for time in times if time is not None]
    rising = len(known) == len(times) and all(a < b for a, b in pairwise(known))
    return replace(index, times=tuple(known) if rising else (), keys=tuple(keys) if rising else (), count=len(times))
