"""Open a video file safely, and decode it with FFmpeg frame by frame, leaving out damaged packets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av

from ..kvae.errors import WeightsError
from ..kvae.paths import check_regular

HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics, by their numbers in ITU-T H.273
MOST_REFUSED = 0.1  # of the packets: a video with more damage is not fit to train on


@contextmanager
def open_video(path: str | os.PathLike) -> Iterator[Any]:
    """Open a file and yield its av.VideoStream; if it has several, the one that players choose.

    Raises:
        WeightsError: no such file, not a video, HDR, or an unknown codec.
    """
    check_regular(path)
    try:
        # "file:" keeps a path from being read as an address; the whitelist lets a playlist open files only
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a video ({_reason(error)})") from None
    with container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise WeightsError(f"{path}: has no video stream")
        if stream.codec_context is None:
            raise WeightsError(f"{path}: this FFmpeg cannot decode the codec of this video")
        check_sdr(path, stream.codec_context)
        stream.thread_type = "AUTO"
        yield stream


def check_sdr(path: str | os.PathLike, context: Any) -> None:
    """Raise if the video is HDR: unconverted it looks flat and grey, and there is no one right conversion to SDR.

    Raises:
        WeightsError: the transfer characteristic is PQ or HLG.
    """
    transfer = HDR.get(getattr(context, "color_trc", 0) or 0)
    if transfer:
        raise WeightsError(
            f"{path}: HDR ({transfer}) is not supported; convert it to SDR first, for example with ffmpeg's tonemap"
        )


class FrameDecoder:
    """The frames of a stream from its current position, in the order in which they are shown.

    A packet that does not decode is skipped, as players do.
    """

    def __init__(self, path: str | os.PathLike, stream: Any):
        self.path, self.stream = path, stream
        self.packets = self.refused = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield av.VideoFrame.

        Raises:
            WeightsError: more than a tenth of the packets do not decode, or no packet does.
        """
        found = False
        for packet in packets(self.stream.container, self.stream):
            try:
                frames = self._decode(packet)
            except av.FFmpegError:
                self.refused += self.packets > 0  # packets before the first key frame of a recording do not count
                self.packets += self.packets > 0
                continue
            self.packets += 1
            for frame in frames:
                found = True
                self._check()
                yield frame
        self._check()
        if not found:
            raise WeightsError(f"{self.path}: damaged: no frame decodes")

    def _decode(self, packet: Any) -> list[Any]:
        frames = self.stream.decode(packet)
        for frame in frames:
            check_sdr(self.path, frame)
        return frames

    def _check(self) -> None:
        if self.refused > MOST_REFUSED * self.packets + 1:
            raise WeightsError(f"{self.path}: damaged: {self.refused} of {self.packets} packets do not decode")


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of the streams, or of all streams if none is given, and a last one that flushes the decoder.

    In a file that is cut short, the packets end at the cut.
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
