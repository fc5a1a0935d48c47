"""Which frames of a video are shown, and when: what headers say of it may be too much or too little.

Packets tell in most files, without decoding them: each has the time at which its frame is shown, or a mark that it is
not. Whether they do is tried at the start and at the end of the file; where not, all of it is decoded.
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
from .video_stream import Decoded, opened, packets

TRIED = 48  # frames from the start: more than a codec holds back
WHOLE = 0.9  # of the duration that the file states, to count as one that does not break off
HIDDEN = ("vp8",)  # codecs whose packets may hold a frame that is never shown


@dataclass(frozen=True)
class Shown:
    """The frames of a video in the order they are shown in.

    Args:
        times: of each, in ticks; not known where the file gives none.
        keys: the times at which decoding can begin, in order.
        tick: seconds.
        count: frames.
        back: key frames to go back by; one, or two where a file can only be entered behind the one that is asked for.
        lost: why the file is not whole; "" where it is.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...]
    tick: Fraction
    count: int
    rate: Fraction
    back: int = 1
    lost: str = ""

    def seconds(self, i: int) -> Fraction:
        """When frame i is shown, after the first."""
        if not self.times:
            return i / self.rate
        steady = i / self.rate  # times in whole milliseconds, as Matroska's, are rounded
        exact = (self.times[i] - self.times[0]) * self.tick
        return steady if abs(steady - exact) <= self.tick else exact

    def key_before(self, time: int) -> int | None:
        """The time to go to for the frame of that time and the one before it; None for the start of the file."""
        at = bisect_left(self.keys, time) - self.back
        return self.keys[at] if at >= 0 else None


def shown(path: str | os.PathLike) -> Shown:
    """The frames of a video file.

    Raises:
        WeightsError: as `opened` and `Decoded`.
    """
    check_regular(path)
    state = os.stat(path)
    return _shown(os.fspath(path), state.st_mtime_ns, state.st_size)


@lru_cache(64)
def _shown(path: str, *_state: int) -> Shown:
    index = _demuxed(path)
    if index.times and _agrees_at_start(path, index):
        for back in (1, 2):
            index = replace(index, back=back)
            if _agrees_at_end(path, index):
                return index
    return _decoded(path, index)


def _demuxed(path: str) -> Shown:
    """By the packets; without times where those do not tell."""
    times: list[int | None] = []
    keys, end = [], Fraction(0)
    with opened(path) as stream:
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
        if container.format.name == "avi":  # whose duration FFmpeg shortens to what is there
            stated = max(stated, stream.frames / rate)
        told = stream.codec_context.name not in HIDDEN and None not in times and len(set(times)) == len(times)
    lost = f"cut short, it ends after {float(end):.2f} of {float(stated):.2f} seconds" if end < WHOLE * stated else ""
    known = tuple(sorted(time for time in times if time is not None)) if told else ()
    return Shown(known, tuple(sorted(keys)), tick, len(known), rate, lost=lost)


def _agrees_at_start(path: str, index: Shown) -> bool:
    """Whether what decodes first is what the packets say."""
    with opened(path) as stream:
        start = [frame.pts for frame in islice(Decoded(path, stream), TRIED)]
    return start == list(index.times[:TRIED])


def _agrees_at_end(path: str, index: Shown) -> bool:
    """Whether what decodes last is, from a key frame on."""
    end = index.times[-1]
    key = index.key_before(end)
    with opened(path) as stream:
        if key is not None and not seek(stream, key):
            return False
        key = max((time for time in index.keys if time < end), default=index.times[0])
        try:
            found = [frame.pts for frame in Decoded(path, stream) if frame.pts is None or frame.pts >= key]
        except WeightsError:  # what is marked as a key frame is none
            return False
    return found == [time for time in index.times if time >= key]


def seek(stream: Any, time: int) -> bool:
    """Go to the key frame of that time, or before; whether the file can."""
    try:
        stream.container.seek(time, stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


def _decoded(path: str, index: Shown) -> Shown:
    """By decoding all of it."""
    times: list[int | None] = []
    keys = []
    with opened(path) as stream:
        for frame in Decoded(path, stream):
            times.append(frame.pts)
            if frame.key_frame and frame.pts is not None:
                keys.append(frame.pts)
    known = [time for time in times if time is not None]
    rising = len(known) == len(times) and all(a < b for a, b in pairwise(known))
    return replace(index, times=tuple(known) if rising else (), keys=tuple(keys) if rising else (), count=len(times))
