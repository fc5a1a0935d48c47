"""Write a video file segment by segment: memory does not grow with its length.

with VideoWriter("a.mp4", 1280, 720, fps=24) as writer:
    for frames in segments:        # [T, H, W, 3] in 0..1, or uint8
        writer.write(frames)
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from ..kvae.paths import file_errors, written_whole
from .sound import Sound, SoundTrack

logger = logging.getLogger(__name__)

CODECS = {"h264": "libx264", "h265": "libx265", "av1": "libsvtav1"}
_TAGS = {"h265": "hvc1"}  # Apple's players do not open hev1
CRF = range(52)
SLOWEST, FASTEST = Fraction(1, 1000), 1000  # frames per second
ROUNDING = Fraction(5, 10_000)  # 23.976 is 24000/1001 rounded to three places
FINE = Fraction(1, 90_000)  # seconds: the unit of times of a variable frame rate
_ACCURATE = 0x2 | 0x40000  # SWS_BILINEAR | SWS_ACCURATE_RND: without it values are truncated, which shifts colours
_BT709, _LIMITED, _FULL = 1, 1, 2  # numbers of ITU-T H.273 and FFmpeg; libswscale's number of the matrix is the same


class VideoWriter:
    """An mp4 file that appears when it is complete. A failure or Cancel before that leaves no file, unless asked to.

    Args:
        fps: frames per second; None if each frame comes with its time.
        crf: constant quality of the codec, 0 to 51; the lower, the better the quality and the larger the file.
        audio: ComfyUI's AUDIO, {"waveform": [B, C, N], "sample_rate": …}, cut where the video ends.
        metadata: texts for the file's header.
        keep_unfinished: whether a failure or Cancel leaves a file of the frames that were written, with their sound.

    Raises:
        ValueError: a rate, codec, quality, size or sound that cannot be written; raised before the file is opened.
        WeightsError: the path cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        width: int,
        height: int,
        fps: float | Fraction | None,
        codec: str = "h264",
        crf: int = 18,
        audio: Any = None,
        metadata: dict[str, str] | None = None,
        keep_unfinished: bool = False,
    ):
        self.path, self.width, self.height, self.codec = Path(path), width, height, codec
        if not isinstance(codec, str) or codec not in CODECS:
            raise ValueError(f"codec is {codec!r}; expected one of {', '.join(CODECS)}")
        if CODECS[codec] not in av.codecs_available:
            raise ValueError(f"codec is {codec}, but this build of PyAV lacks {CODECS[codec]}; choose another codec")
        if isinstance(crf, bool) or crf not in CRF:
            raise ValueError(f"crf is {crf!r}; expected a whole number from {CRF[0]} to {CRF[-1]}")
        if width % 2 or height % 2 or width < 2 or height < 2:
            raise ValueError(
                f"a video of {width}x{height}; expected even sides: colour is stored at half the resolution"
            )
        self.rate = None if fps is None else exact_rate(fps)
        self.crf, self.metadata, self.keep_unfinished = int(crf), metadata or {}, keep_unfinished
        self.sound = None if audio is None else Sound(audio)
        self.unit = FINE if self.rate is None else 1 / self.rate
        self.frames, self.next, self.last, self.step = 0, 0, Fraction(0), 1 / (self.rate or Fraction(25))

    def __enter__(self) -> VideoWriter:
        self._file = self._opened()
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._file.__exit__(*error)

    def write(self, frames_THW3: Tensor, times: Sequence[Fraction] | None = None) -> None:
        """Append frames [T, H, W, 3] in 0..1, or uint8.

        Args:
            times: when each frame is shown, in seconds; for a writer without fps.

        Raises:
            ValueError: frames of another size.
        """
        if tuple(frames_THW3.shape[1:]) != (self.height, self.width, 3):
            raise ValueError(f"frames of shape {list(frames_THW3.shape)}; expected [T, {self.height}, {self.width}, 3]")
        if frames_THW3.dtype != torch.uint8:
            frames_THW3 = (frames_THW3 * 255).round().clamp(0, 255).to(torch.uint8)
        for i, picture in enumerate(frames_THW3.cpu().contiguous().numpy()):
            self._write(picture, self.frames * self.step if times is None else times[i])
        if self.track:
            self.track.write_until(self.last + self.step)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        with file_errors(self.path), suppress(FileNotFoundError):
            os.lstat(self.path)  # a name that is too long fails now, not after the work
        with written_whole(self.path) as partial:
            options = {"movflags": "use_metadata_tags+faststart"}
            self.container = av.open(f"file:{partial}", "w", format="mp4", options=options)
            try:
                self._add_streams()
                stopped = yield from self._until_stopped()
                self._finish()
            except BaseException:
                with suppress(Exception):
                    self.container.close()
                raise
            self.container.close()
        if stopped:
            logger.warning("%s: stopped; the first %d frames are kept", self.path, self.frames)
            raise stopped

    def _until_stopped(self) -> Generator[None, None, BaseException | None]:
        """Yield once; return the error that the file is to be finished in spite of."""
        try:
            yield
        except BaseException as error:
            if not (self.keep_unfinished and self.frames):
                raise
            return error
        return None

    def _add_streams(self) -> None:
        self.container.metadata.update(self.metadata)
        video: Any = self.container.add_stream(CODECS[self.codec], rate=self.rate or 25)
        video.width, video.height, video.pix_fmt = self.width, self.height, "yuv420p"
        video.options = {"crf": str(self.crf)}
        if self.rate is None:
            video.options |= {"bf": "0"}  # the file ends at the last coded frame; without B-frames it is the last shown
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        context.time_base = self.unit
        if self.codec in _TAGS:
            context.codec_tag = _TAGS[self.codec]
        self.video = video
        self.track = SoundTrack(self.container, self.sound) if self.sound else None

    def _write(self, picture: Any, time: Fraction) -> None:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=_BT709,
            interpolation=_ACCURATE,
            src_color_range=_FULL,
            dst_color_range=_LIMITED,
        )
        frame.pts, frame.time_base = max(round(time / self.unit), self.next), self.unit
        self.container.mux(self.video.encode(frame))
        self.next, self.frames = frame.pts + 1, self.frames + 1
        if self.rate is None and time > self.last:
            self.step = time - self.last
        self.last = time

    def _finish(self) -> None:
        for packet in self.video.encode(None):
            if self.frames < 3:  # so few are coded in the order in which they are shown; x265 then leaves dts undefined
                packet.dts = packet.pts
            self.container.mux(packet)
        if self.track:
            self.track.close()


def exact_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as a fraction. NTSC rates, rounded to three places, become exact: 23.976 is 24000/1001.

    Raises:
        ValueError: not a number from 0.001 to 1000.
    """
    known = isinstance(fps, int | float | Fraction) and not isinstance(fps, bool) and math.isfinite(fps)
    if not known or not SLOWEST <= fps <= FASTEST:
        raise ValueError(f"fps is {fps!r}; expected frames per second from {float(SLOWEST)} to {FASTEST}")
    if isinstance(fps, Fraction):
        return fps
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if ntsc and abs(ntsc - Fraction(fps)) < ROUNDING else Fraction(fps).limit_denominator(100_000)


def write_video(path: str | os.PathLike, frames_3THW: Tensor, fps: float | Fraction | Sequence[Fraction]) -> None:
    """Write uint8 [3, T, H, W], H and W even, as an H.264 mp4 that players and browsers open.

    Args:
        fps: frames per second, or the time of each frame in seconds.

    Raises:
        ValueError, WeightsError: see `VideoWriter`.
    """
    _, _, height, width = frames_3THW.shape
    times = fps if isinstance(fps, Sequence) else None
    with VideoWriter(path, width, height, _constant_rate(times) if times else fps, crf=16) as writer:  # type: ignore[arg-type]
        writer.write(frames_3THW.permute(1, 2, 3, 0), times)


def _constant_rate(times: Sequence[Fraction]) -> Fraction | None:
    """The frames per second of frames at these times, which start at 0; None if they are not evenly spaced."""
    step = times[1] if len(times) > 1 else Fraction(1, 25)
    even = all(time == i * step for i, time in enumerate(times))
    return 1 / step if even and SLOWEST <= 1 / step <= FASTEST else None
