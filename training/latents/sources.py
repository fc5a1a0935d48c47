"""The files that a command reads, and the names of what it makes of them.

a/clip.latent → clip.mp4; of a folder a: below/clip.latent → below/clip.mp4
clip.latent and clip.safetensors → clip.latent.mp4 and clip.safetensors.mp4
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..data.walk import files_under
from ..errors import UserError

TEXT_CACHE = (
    "_te.safetensors"  # the end of the names of musubi-tuner's caches of captions, which lie beside the latents
)


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
        name: of what is made of it, without an ending, relative to the folder of results.
    """

    path: Path
    name: str


def find_sources(inputs: list[str], endings: Collection[str]) -> list[Source]:
    """The files of `find_files`, with a distinct name for the results of each.

    Raises:
        UserError, WeightsError: as `find_files`; or two would give results of one name.
    """
    names = _distinct(dict(find_files(inputs, endings)))
    return [Source(path, name) for path, name in names.items()]


def find_files(inputs: list[str], endings: Collection[str]) -> list[tuple[Path, str]]:
    """These files, and all files below these folders with one of the endings, each once; links are followed.

    Returns:
        Each file's path, and its path relative to the folder that was given.

    Raises:
        UserError: a folder holds none.
        WeightsError: a folder cannot be read.
    """
    found: dict[str, tuple[Path, str]] = {}  # the first spelling of each
    for each in map(Path, inputs):
        inside = sorted(path for path in files_under(each) if _fits(path, endings)) if each.is_dir() else []
        if each.is_dir() and not inside:
            raise UserError(f"{each}: no {', '.join(endings)} files in it")
        for path, relative in [(path, path.relative_to(each).as_posix()) for path in inside] or [(each, each.name)]:
            found.setdefault(os.path.realpath(path), (path, relative))
    return list(found.values())


def _fits(path: Path, endings: Collection[str]) -> bool:
    return path.suffix.lower() in endings and not path.name.startswith(".") and not path.name.endswith(TEXT_CACHE)


def _distinct(files: Mapping[Path, str]) -> dict[Path, str]:
    """A distinct name for each file, even if the file system ignores case.

    Args:
        files: relative paths of the files.

    Raises:
        UserError: two relative paths are equal.
    """
    names = {path: os.path.splitext(relative)[0] for path, relative in files.items()}
    while True:
        takers: dict[str, list[Path]] = defaultdict(list)
        for path, name in names.items():
            takers[unicodedata.normalize("NFC", name).casefold()].append(path)
        clashing = [path for paths in takers.values() if len(paths) > 1 for path in paths]
        if not clashing:
            return names
        shorter = {path: files[path] for path in clashing if names[path] != files[path]}
        if not shorter:
            one, other, *_ = clashing
            raise UserError(f"{one} and {other} would give results of one name; use two runs, with two --output")
        names |= shorter
