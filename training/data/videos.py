"""Videos: find them, split them into training and test, and cut clips from them.

# T frames, H/W pixels; frames are uint8, [3, T, H, W], RGB
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kvae.errors import WeightsError
from ...serving.fit import CROP, STRETCH, fit_picture
from ...serving.video_index import VideoIndex, index_video
from ...serving.video_reader import read_pictures
from ..errors import UserError
from .walk import files_under

EXTENSIONS = (".avi", ".mp4", ".mkv", ".mov", ".webm")
MIN_FRAMES = 5  # two latent frames
HELD_OUT = 0.05  # share of the videos, where nothing says which
UCF101_TEST_GROUPS = range(1, 8)  # testlist01 of UCF101 is groups g01 to g07


@dataclass(frozen=True)
class Clip:
    """Frames of a video: `count` frames from `first` on, or spread over the whole video if `first` is None."""

    video: Path
    count: int
    first: int | None


def find_videos(root: str | Path, split: str = "all") -> list[Path]:
    """All videos under a folder, sorted, links followed; or those of a split, "train" or "test".

    The split comes from UCF101's trainlist01.txt/testlist01.txt (in the folder, or in ucfTrainTestlist next to or
    inside it), else from folders named train/test/val anywhere in the tree, else from the group number in UCF101's file
    names. Lists are matched by file names without the extension, since copies are often mp4 files.

    Raises:
        UserError: the folder is missing, holds no video, or has no such split.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --videos-root must be a folder of videos")
    videos = sorted(path for path in files_under(root) if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not videos:
        raise UserError(f"{root}: no videos in it ({', '.join(EXTENSIONS)})")
    if split == "all":
        return videos
    chosen = _listed(root, videos, split) or _in_folders(root, videos, split) or _of_groups(root, videos, split)
    if not chosen:
        raise UserError(
            f"{root}: no {split} split found; expected {split}list01.txt, a folder {split}, or UCF101's names "
            "(v_Class_g01_c01.avi); or leave --split out"
        )
    return chosen


def hold_out(root: str | Path, videos: list[Path]) -> tuple[list[Path], list[Path]]:
    """Videos to train on, and videos held out: both splits of `find_videos` if they exist, else a twentieth by hash.

    By hash, what belongs together stays together: the videos of a folder, if at least 20 folders hold videos; else the
    videos of one name up to a clip number as in UCF101 (`_c01`).

    Args:
        videos: all videos of the folder.

    Raises:
        UserError: nothing can be held out.
    """
    root = Path(root)
    for rule in (_listed, _in_folders, _of_groups):
        train, test = (rule(root, videos, split) for split in ("train", "test"))
        if train and test and not set(train) & set(test):
            return train, test
    folders = len({path.parent for path in videos}) >= 1 / HELD_OUT
    keys = [str(path.parent.relative_to(root)) if folders else re.sub(r"_c\d+$", "", path.stem) for path in videos]
    by_hash = sorted(set(keys), key=lambda key: zlib.crc32(key.encode(errors="surrogatepass")))
    if len(by_hash) < 2:
        raise UserError(f"{root}: {len(videos)} videos of one source; expected at least two, one of them to hold out")
    held_out = set(by_hash[: max(1, int(len(by_hash) * HELD_OUT))])
    both = list(zip(videos, keys, strict=True))
    return [path for path, key in both if key not in held_out], [path for path, key in both if key in held_out]


def _listed(root: Path, videos: list[Path], split: str) -> list[Path]:
    for folder in (root, root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist"):
        listing = folder / f"{split}list01.txt"
        if listing.is_file():
            lines = listing.read_text(errors="replace").splitlines()
            stems = {Path(line.split()[0]).stem for line in lines if line.strip()}
            return [path for path in videos if path.stem in stems]
    return []


def _in_folders(root: Path, videos: list[Path], split: str) -> list[Path]:
    for name in {"train": ("train",), "test": ("test", "val")}[split]:
        chosen = [path for path in videos if name in path.relative_to(root).parts[:-1]]
        if chosen:
            return chosen
    return []


def _of_groups(root: Path, videos: list[Path], split: str) -> list[Path]:
    groups = {path: re.search(r"_g(\d+)_c\d+$", path.stem) for path in videos}
    return [p for p, g in groups.items() if g and (int(g[1]) in UCF101_TEST_GROUPS) == (split == "test")]


def count_frames(path: Path) -> int:
    """Number of frames that a player shows.

    Raises:
        UserError: not a video, damaged, or cut short.
    """
    return _complete(path).count


def cut(path: Path, count: int, clips: int) -> list[Clip]:
    """At most `clips` clips of `count` consecutive frames, evenly spaced over the video, without overlap.

    Raises:
        UserError: as `count_frames`; with `clips` 1, the video is not opened.
    """
    if clips == 1:
        return [Clip(path, count, 0)]
    total = count_frames(path)
    fit = min(clips, max(1, total // count))
    gap = (total - count) / (fit - 1) if fit > 1 else 0
    return [Clip(path, count, int(i * gap)) for i in range(fit)]


def read_clip(clip: Clip, height: int, width: int, fit: str = STRETCH) -> Tensor:
    """The frames of a clip, resized, as uint8 [3, T, H, W]. T is smaller than asked if the video is shorter.

    Raises:
        UserError: not a video, damaged, cut short, or shorter than 5 frames.
    """
    return next(read_clips([clip], height, width, fit))


def read_clips(clips: list[Clip], height: int, width: int, fit: str = STRETCH) -> Iterator[Tensor]:
    """Yield the frames of several clips of a video, which is decoded once. The clips must be in order, without overlap.

    Raises:
        UserError: as `read_clip`, after the clips before it were yielded; or `fit` is unknown.
    """
    video = clips[0].video
    if fit not in (CROP, STRETCH):  # it may come from a pair that others wrote
        raise UserError(f"{video}: fit is {fit!r}; expected {CROP} or {STRETCH}")
    with _user_errors():
        places = [_places(clip) for clip in clips]
        pictures = read_pictures(video, [place for window in places for place in window])
        for window in places:
            frames = [fit_picture(picture, height, width, fit) for picture in islice(pictures, len(window))]
            if len(frames) < len(window):
                _complete(video)  # raises if the file is cut short
            if len(frames) < MIN_FRAMES:
                raise UserError(f"{video}: only {len(frames)} frames decode; expected at least {MIN_FRAMES}")
            yield torch.stack(frames, dim=1)


def times_of(clip: Clip) -> list[Fraction]:
    """Times of a clip's frames, in seconds after its first; frames past the end of the video have none.

    Raises:
        UserError: not a video, or damaged.
    """
    with _user_errors():
        index = index_video(clip.video)
    places = [place for place in _places(clip) if place < index.count]
    return [index.seconds(place) - index.seconds(places[0]) for place in places]


def _places(clip: Clip) -> list[int] | range:
    if clip.first is not None:
        return range(clip.first, clip.first + clip.count)
    total = count_frames(clip.video)
    return np.linspace(0, total - 1, min(clip.count, total), dtype=np.int64).tolist()


def _complete(path: Path) -> VideoIndex:
    """The index of a video; UserError if the file is cut short."""
    with _user_errors():
        index = index_video(path)
    if index.lost:
        raise UserError(f"{path}: {index.lost}")
    return index


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn a WeightsError into a UserError: here, a file that cannot be read is one of many."""
    try:
        yield
    except WeightsError as error:
        raise UserError(str(error)) from None
