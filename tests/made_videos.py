"""Videos of every kind, made with PyAV, or with ffmpeg if it is installed; frames and a tone to put in them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import needs
from kvae_comfyui.serving.video_reader import read_pictures

FFMPEG = shutil.which("ffmpeg")
FIXED_POINT, ONE = 1 << 16, 1 << 30  # the number 1 in a display matrix: 16.16, and 2.30 in its last column


def greys(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that show their own number, up to 255, as two grey digits left and right. uint8 [T, H, W, 3]."""
    frames = np.empty((count, height, width, 3), np.uint8)
    for n, frame in enumerate(frames):
        frame[:, : width // 2], frame[:, width // 2 :] = 20 + 14 * (n // 16), 20 + 14 * (n % 16)
    return frames


def which(frames: Iterable[np.ndarray]) -> list[int]:
    """The numbers that frames of `greys` show."""
    halves = [np.split(frame.astype(float), 2, axis=1) for frame in frames]
    return [16 * _digit(left) + _digit(right) for left, right in halves]


def _digit(half: np.ndarray) -> int:
    return round((half.mean() - 20) / 14)


def all_frames(path: Path) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3], as the reader gives them."""
    return np.stack([each.rgb for each in read_pictures(path, range(10**6))])


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that every rotation and mirroring changes. uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    red, green = 40 + 160 * x / width, 40 + 160 * y / height
    blue = np.where((x < width // 3) & (y < height // 4), 220, 40)
    return np.stack([red, green, blue], -1).astype(np.uint8)


def make(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    form: str = "yuv444p",
    rate: Fraction | int = 25,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """Write a video of frames, uint8 [H, W, 3] or av.VideoFrame.

    Args:
        times: when to show each frame, in ticks of 1/rate; one a tick if it is not given.
        context: attributes of the codec context, such as tags of colour.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    default = {"crf": "0"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=default | (options or {}))
        for n, each in enumerate(frames):
            frame = each if isinstance(each, av.VideoFrame) else av.VideoFrame.from_ndarray(np.ascontiguousarray(each))
            if n == 0:
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, form
                for name, value in context.items():
                    setattr(stream.codec_context, name, value)
            frame.pts, frame.time_base = n if times is None else times[n], 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, change: Any, container: dict[str, str] | None = None) -> Path:
    """Copy the packets to another file, each as `change(n, packet)` returns it; None leaves a packet out."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=container or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for n, packet in enumerate(old.demux(video=0)):
            if packet.dts is None:
                continue
            packet = change(n, packet)
            if packet is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def place(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Give an mp4 the display matrix x' = ax + cy, y' = bx + dy."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    matrix = a * FIXED_POINT, b * FIXED_POINT, 0, c * FIXED_POINT, d * FIXED_POINT, 0, 0, 0, ONE
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    return path


def ffmpeg(*arguments: str, into: Path | None = None) -> bytes:
    """Run ffmpeg; returns its standard output. Skips the test if ffmpeg is not installed."""
    if FFMPEG is None:
        pytest.skip(needs.FFMPEG)
    command = [FFMPEG, "-v", "error", "-nostdin", "-y", *arguments, *([str(into)] if into else [])]
    return subprocess.run(command, capture_output=True, check=True).stdout


def by_ffmpeg(path: Path, height: int, width: int, *filters: str) -> np.ndarray:
    """Frames of a video as ffmpeg shows them, uint8 [T, H, W, 3]."""
    raw = ffmpeg(*("-i", str(path), *filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-"))
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def sine(rate: float, channels: int = 2, seconds: float = 3.0) -> dict:
    """A tone of 440 Hz as AUDIO of ComfyUI; each channel is half as loud as the one before it."""
    time = torch.arange(round(seconds * rate)) / rate
    loudness = 0.5 ** torch.arange(1, channels + 1)
    return {"waveform": (loudness[:, None] * torch.sin(2 * torch.pi * 440 * time))[None], "sample_rate": rate}
