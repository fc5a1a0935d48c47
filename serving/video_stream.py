"""A video file as FFmpeg decodes it: opened safely, frame by frame, with what does not decode left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av

from ..kvae.errors import WeightsError
from ..kvae.paths import check_regular

HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics, by the numbers of ITU-T H.273
MOST_REFUSED = 0.1  # of the packets: what is broken beyond that is no video to learn from


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Any]:
    """The video stream of a file, an av.VideoStream; of several, the one that players choose.

    Raises:
        WeightsError: no such file, not a video, or one that is not read (HDR, an unknown codec).
    """
    check_regular(path)
    try:
        # a path is never taken for an address, and a playlist opens nothing but files
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a video ({_reason(error)})") from None
    with container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise WeightsError(f"{path}: has no video stream")
        if stream.codec_context is None:
            raise WeightsError(f"{path}: a video of a codec that this FFmpeg does not decode")
        check_range(path, stream.codec_context)
        stream.thread_type = "AUTO"
        yield stream


def check_range(path: str | os.PathLike, context: Any) -> None:
    """Refuse HDR: its values shown as they are look flat and grey, and there is no one right way to SDR.

    Raises:
        WeightsError: the transfer characteristic is PQ's or HLG's.
    """
    transfer = HDR.get(getattr(context, "color_trc", 0) or 0)
    if transfer:
        raise WeightsError(
            f"{path}: HDR ({transfer}), which is not converted; make it SDR first, as with ffmpeg's zscale and tonemap"
        )


class Decoded:
    """The frames of a stream from where it stands, in the order they are shown in.

    A packet that does not decode is left out, as players do.
    """

    def __init__(self, path: str | os.PathLike, stream: Any):
        self.path, self.stream = path, stream
        self.packets = self.refused = 0

    def __iter__(self) -> Iterator[Any]:
        """Yields av.VideoFrame.

        Raises:
            WeightsError: more than a tenth of the packets do not decode, or none does.
        """
        found = False
        for packet in packets(self.stream.container, self.stream):
            try:
                frames = self._decode(packet)
            except av.FFmpegError:
                self.refused += self.packets > 0  # before the first that does, a recording begins between key frames
                self.packets += self.packets > 0
                continue
            self.packets += 1
            for frame in frames:
                found = True
                self._check()
                yield frame
        self._check()
        if not found:
            raise WeightsError(f"{self.path}: damaged, none of its frames decodes")

    def _decode(self, packet: Any) -> list[Any]:
        frames = self.stream.decode(packet)
        for frame in frames:
            check_range(self.path, frame)
        return frames

    def _check(self) -> None:
        if self.refused > MOST_REFUSED * self.packets + 1:
            raise WeightsError(f"{self.path}: damaged, {self.refused} of {self.packets} packets do not decode")


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of the streams, of all where none is named, and one at the end that flushes the decoder.

    A file that breaks off ends there.
    """
    flushed = False
    try:
        for packet in container.demux(*streams):
            flushed = packet.size == 0 and packet.dts is None
            yield packet
    except av.FFmpegError:
        pass
    if not flushed and streams:
        yield None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
