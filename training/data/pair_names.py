"""The pair file of a clip: named as the video, without its extension if that is unambiguous.

a/clip.mp4 → a/clip.safetensors.zst
a/clip.mov and a/clip.mp4 → a/clip.mov.safetensors.zst and a/clip.mp4.safetensors.zst
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePath

from ...kvae.paths import file_errors
from ..errors import UserError
from .pairs import SUFFIX, read_header

MIRRORED = ".mirrored"  # ending of the names of mirrored pairs


class PairNames:
    """Names of the pair files of all videos of a folder, the same for every process and every --split.

    Args:
        root, out: folders of the videos and of the pairs.
        videos: all videos of the folder.
        windows: whether each video has several clips; a number then follows its name.
    """

    def __init__(self, root: Path, out: Path, videos: Iterable[Path], windows: bool):
        self.root, self.out = root, out
        folders: dict[Path, list[str]] = defaultdict(list)
        for video in videos:
            folders[video.parent].append(video.name)
        self.stems = {folder: _distinct(files, windows) for folder, files in folders.items()}

    def place(self, video: Path, ending: str) -> tuple[Path, bool]:
        """The pair file of a clip, and whether it exists.

        A pair that an earlier run made of this video under a shorter name counts. A pair of another video is not
        touched. A pair that cannot be read counts as missing.

        Args:
            ending: follows the video's name.

        Raises:
            UserError: all names that this pair could have belong to pairs of other videos.
            WeightsError: the file system cannot have a file of that name, or something else has the name.
        """
        stem, relative = self.stems[video.parent][video.name], video.relative_to(self.root)
        free = None
        for name in dict.fromkeys((stem, video.name, video.stem)):
            path = self.out / relative.parent / (name + ending + SUFFIX)
            with file_errors(path):
                there = path.exists()
            of = _made_of(path) if there else None
            if of == relative.as_posix() or (of == "" and name == stem):
                return path, True
            # a shorter name than this video's own is used only if the pair is there already
            if free is None and of is None and (name == stem or name == video.name):
                free = path
        if free is None:
            raise UserError(f"{video}: {self.out / relative.parent / (stem + ending + SUFFIX)} is another video's pair")
        return free, False


def _made_of(path: Path) -> str | None:
    """The video of a pair file; "" if the pair does not say, None if it cannot be read."""
    try:
        source = read_header(path)[1]
    except UserError:
        return None
    return source.video if source else ""


def _distinct(files: list[str], windows: bool) -> dict[str, str]:
    """A distinct name for each video file of a folder, even if the file system ignores case."""
    names = {file: PurePath(file).stem for file in files}
    while True:
        takers: dict[str, set[str]] = defaultdict(set)
        for file, name in names.items():
            for ending in ("",) if windows else ("", MIRRORED):
                takers[unicodedata.normalize("NFC", name + ending).casefold()].add(file)
        clashing = {file for each in takers.values() if len(each) > 1 for file in each if names[file] != file}
        if not clashing:
            return names
        names |= {file: file for file in clashing}
