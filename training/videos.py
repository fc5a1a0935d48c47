"""Videos: finding them, decoding them, choosing frames, resizing.

# T frames, H/W pixels; frames are uint8, [3, T, H, W], RGB
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

EXTENSIONS = (".avi", ".mp4", ".mkv", ".mov", ".webm")
ANNOUNCED_TOLERANCE = 0.9  # containers may announce a frame or two too many
MIN_FRAMES = 5  # two latents; anything shorter is a picture
UCF101_TEST_GROUPS = range(1, 8)  # testlist01 of UCF101 is groups g01 to g07


@dataclass(frozen=True)
class Clip:
    """Frames of one video: `count` of them from `first` on, or spread over the whole of it where `first` is None."""

    video: Path
    count: int
    first: int | None


def find_videos(root: str | Path, split: str = "all") -> list[Path]:
    """All videos under a folder, sorted; or the part of UCF101 that `split` ("train", "test") names.

    The split is read from trainlist01.txt/testlist01.txt (in the folder, or in ucfTrainTestlist beside or inside it),
    else from train/test/val folders, else from the group number in UCF101's file names.

    Raises:
        UserError: the folder is missing, holds no video, or has no such split.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --videos-root takes a folder of videos")
    videos = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not videos:
        raise UserError(f"{root}: no videos in it ({', '.join(EXTENSIONS)})")
    if split == "all":
        return videos
    chosen = _split(root, videos, split)
    if not chosen:
        raise UserError(
            f"{root}: no {split} split found; expected {split}list01.txt, a folder {split}, or UCF101's names "
            "(v_Class_g01_c01.avi): or leave --split out"
        )
    return chosen


def _split(root: Path, videos: list[Path], split: str) -> list[Path]:
    for folder in (root, root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist"):
        listing = folder / f"{split}list01.txt"
        if listing.is_file():
            names = {Path(line.split()[0]).name for line in listing.read_text().splitlines() if line.strip()}
            return [path for path in videos if path.name in names]
    folders = {"train": ("train",), "test": ("test", "val")}[split]
    chosen = [path for path in videos if path.relative_to(root).parts[0] in folders]
    if chosen:
        return chosen
    groups = {path: re.search(r"_g(\d+)_c\d+$", path.stem) for path in videos}
    return [p for p, g in groups.items() if g and (int(g[1]) in UCF101_TEST_GROUPS) == (split == "test")]


def count_frames(path: Path) -> int:
    """Frames that the container announces, or as many as decode where it does not.

    Raises:
        UserError: not a video.
    """
    return _announced(path) or sum(1 for _ in _decoded(path))


def cut(path: Path, count: int, clips: int) -> list[Clip]:
    """`clips` windows of `count` consecutive frames, evenly spaced over the video and never overlapping."""
    if clips == 1:
        return [Clip(path, count, 0)]
    total = count_frames(path)
    fit = min(clips, max(1, total // count))
    gap = (total - count) / (fit - 1) if fit > 1 else 0
    return [Clip(path, count, int(i * gap)) for i in range(fit)]


def read_clip(clip: Clip, height: int, width: int) -> Tensor:
    """The frames of a clip, resized, as uint8 [3, T, H, W]. T may be less than asked where the video is shorter.

    Raises:
        UserError: not a video, damaged, cut short, or shorter than 5 frames.
    """
    return next(read_clips([clip], height, width))


def read_clips(clips: list[Clip], height: int, width: int) -> Iterator[Tensor]:
    """The same for several windows of one video, in order and apart, which is decoded once.

    Raises:
        UserError: as `read_clip`, once the windows before are read.
    """
    announced = _announced(clips[0].video)
    if clips[0].first is None:
        frames = _whole([*_decoded(clips[0].video)], clips[0], announced, announced)
        index = np.linspace(0, len(frames) - 1, min(clips[0].count, len(frames)), dtype=np.int64)
        yield resize(_stacked([frames[i] for i in index]), height, width)
        return
    decoded, position = _decoded(clips[0].video), 0
    for clip in clips:
        first = clip.first or 0
        frames = list(islice(decoded, first - position, first - position + clip.count))
        position = first + clip.count
        yield resize(_stacked(_whole(frames, clip, min(clip.count, announced - first), announced)), height, width)


def _whole(frames: list[np.ndarray], clip: Clip, expected: int, announced: int) -> list[np.ndarray]:
    """The frames, if they are as many as the container announces, and enough."""
    if len(frames) < ANNOUNCED_TOLERANCE * expected:
        found = (clip.first or 0) + len(frames)
        raise UserError(f"{clip.video}: cut short, {found} of its {announced} frames decode")
    if len(frames) < MIN_FRAMES:
        raise UserError(f"{clip.video}: only {len(frames)} frames decode; expected at least {MIN_FRAMES}")
    return frames


def _stacked(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


def resize(frames_3THW: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, T, H, W] → uint8 [3, T, height, width], bilinear with antialiasing, one frame at a time."""
    if frames_3THW.shape[2:] == (height, width):
        return frames_3THW.contiguous()
    out = torch.empty(3, frames_3THW.shape[1], height, width, dtype=torch.uint8)
    for t in range(frames_3THW.shape[1]):
        frame = frames_3THW[None, :, t].float()
        frame = F.interpolate(frame, (height, width), mode="bilinear", antialias=True)
        out[:, t] = frame[0].round().clamp(0, 255).byte()
    return out


def write_video(path: Path, frames_3THW: Tensor, fps: float) -> None:
    """uint8 [3, T, H, W], H and W even → an H.264 mp4 that players and browsers open."""
    partial = path.with_name(path.stem + ".partial" + path.suffix)
    try:
        with av.open(str(partial), "w") as container:
            stream = container.add_stream("libx264", rate=round(fps), options={"crf": "16"})
            stream.width, stream.height, stream.pix_fmt = frames_3THW.shape[3], frames_3THW.shape[2], "yuv420p"
            for t in range(frames_3THW.shape[1]):
                image = np.ascontiguousarray(frames_3THW[:, t].permute(1, 2, 0).numpy())
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def frame_rate(path: Path) -> float:
    """Frames per second, 25 where the file does not say."""
    with _open(path) as container:
        return float(container.streams.video[0].average_rate or 25)


def _announced(path: Path) -> int:
    """Frames that the container announces; 0 where it does not."""
    with _open(path) as container:
        return container.streams.video[0].frames


def _open(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a video ({_reason(error)})") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{path}: has no video stream")
    return container


def _decoded(path: Path):
    """RGB frames in order, uint8 [H, W, 3]."""
    with _open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        try:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise UserError(f"{path}: damaged, decoding fails ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
