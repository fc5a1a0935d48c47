"""Which pair file a clip goes into: the video's name without its extension, or with it where that is not enough.

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

MIRRORED = ".mirrored"  # what the names of pairs end in


class PairNames:
    """The pair files of the videos of a folder, the same whoever asks and whatever part of them is extracted.

    Args:
        root, out: the videos, and the pairs.
        videos: all of the folder.
        windows: whether a number follows the name.
    """

    def __init__(self, root: Path, out: Path, videos: Iterable[Path], windows: bool):
        self.root, self.out = root, out
        folders: dict[Path, list[str]] = defaultdict(list)
        for video in videos:
            folders[video.parent].append(video.name)
        self.stems = {folder: _distinct(files, windows) for folder, files in folders.items()}

    def place(self, video: Path, ending: str) -> tuple[Path, bool]:
        """The pair file of a clip, and whether it is there.

        A pair that an earlier run made of this video, when there was none beside it to be told from, counts; one that
        it made of another video is not touched; one that cannot be read is to be made again.

        Args:
            ending: what follows the video's name.

        Raises:
            UserError: other videos' pairs have all names that this one could have.
            WeightsError: no file can have that name, or what has it is none.
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
            # the bare stem is not this video's to take, if it is not this video's already
            if free is None and of is None and (name == stem or name == video.name):
                free = path
        if free is None:
            raise UserError(f"{video}: {self.out / relative.parent / (stem + ending + SUFFIX)} is another video's pair")
        return free, False


def _made_of(path: Path) -> str | None:
    """The video of a pair file; "" where it does not say, None where it cannot be read."""
    try:
        source = read_header(path)[1]
    except UserError:
        return None
    return source.video if source else ""


def _distinct(files: list[str], windows: bool) -> dict[str, str]:
    """A name of its own for each video file of a folder, also where capitals are not told apart."""
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
