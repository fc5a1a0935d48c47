"""What a whole cache folder shows: caches that lack their text, do not stack into a batch, or belong to no item.

musubi-tuner trains on every file that its pattern `*_{model}.safetensors` finds, whatever the dataset config names.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ...kvae import WeightsError
from ...kvae.paths import file_errors
from .buckets import Size, bucket_chooser
from .cache_faults import (
    RENAME,
    SHORTS,
    CacheFile,
    Fault,
    base_of,
    by,
    grids_of,
    grids_text,
    header_faults,
    open_cache,
    short_of,
    unreadable,
)
from .cache_files import read_cache_header
from .config import Dataset

NO_TEXT = "make it with musubi-tuner's script that caches text encoder outputs"
STALE = "delete it, or musubi-tuner trains on it too"


@dataclass
class Folder:
    """A cache folder.

    Attributes:
        caches: whose name and header could be read, by file name.
        texts: names of text caches.
        faults: what was found so far.
        others: files of other models, by the end of their names.
    """

    caches: dict[str, CacheFile] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def sound(self) -> list[CacheFile]:
        """The caches that need not be made anew for what was found so far."""
        wrong = {fault.file for fault in self.faults if fault.again}
        return [file for name, file in self.caches.items() if name not in wrong]


def read_folder(path: Path, dataset: Dataset | None) -> Folder:
    """Read the headers of all files in a folder, and what they show, alone and together.

    Args:
        dataset: whose caches these are, if that is known.

    Raises:
        WeightsError: the folder cannot be read.
    """
    folder = Folder()
    with file_errors(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors") and not name.startswith("."))
    for name in tqdm(names, "headers", unit="file", leave=False, disable=None):
        if short_of(name) in SHORTS:
            _add(folder, path / name, dataset)
        elif short_of(name) == "te" and short_of(name.removesuffix("_te.safetensors")) in SHORTS:
            _add_text(folder, path / name)
        else:
            folder.others[short_of(name)] += 1
    folder.faults += _text_faults(folder)
    folder.faults += _kind_faults(folder, dataset)
    folder.faults += _group_faults(folder, bucket_chooser(dataset) if dataset else None)
    return folder


def _add(folder: Folder, path: Path, dataset: Dataset | None) -> None:
    file = open_cache(path, None if dataset is None else not dataset.is_video)
    if isinstance(file, Fault):
        folder.faults.append(file)
        return
    folder.caches[path.name] = file
    folder.faults += header_faults(file)


def _add_text(folder: Folder, path: Path) -> None:
    folder.texts.add(path.name)
    try:
        read_cache_header(path)
    except WeightsError as error:
        fault = unreadable(path, error)
        folder.faults.append(Fault(fault.file, fault.found, fault.expected, NO_TEXT))


def _text_faults(folder: Folder) -> Iterator[Fault]:
    """One fault for each text cache that is missing, with the first file that needs it."""
    seen = set(folder.texts)
    for name, file in folder.caches.items():
        if file.name.text_name not in seen:
            seen.add(file.name.text_name)
            yield Fault(name, "it has no text cache, so it is left out of training", file.name.text_name, NO_TEXT)


def _kind_faults(folder: Folder, dataset: Dataset | None) -> Iterator[Fault]:
    """Caches of images among those of videos: musubi-tuner stops at the first of them."""
    videos = {file.architecture.short for file in folder.caches.values() if file.name.frames is not None}
    for file in folder.caches.values():
        of_videos = dataset.is_video if dataset else file.architecture.short in videos
        if of_videos and file.name.frames is None:
            yield file.fault(
                "a cache of an image among those of videos, at which musubi-tuner stops",
                "caches of videos",
                "move it to a folder of its own, or delete it",
            )


def _group_faults(folder: Folder, choose: Callable[[Size], Size] | None) -> Iterator[Fault]:
    """Caches that musubi-tuner puts into one batch, but that have other shapes or tensors than the others.

    Args:
        choose: gives the bucket of a size. None: not known; then a video's name has it, an image's does not.
    """
    groups = defaultdict(list)
    for file in folder.sound():
        size = file.name.width, file.name.height
        if choose:
            bucket = choose(size)
            if file.grid and file.grid[1:] not in grids_of(*bucket, file.architecture):
                text = f"latents of {by(file.grid)}, but musubi-tuner puts it into the bucket {bucket[0]}x{bucket[1]}"
                yield file.fault(text, grids_text(*bucket, file.architecture))
                continue
            size = bucket
        elif file.name.frames is None and file.grid:
            size = file.grid[2], file.grid[1]
        groups[file.architecture.short, size, file.name.frames].append(file)
    for files in groups.values():
        kinds = Counter(map(_kind, files))
        usual, count = kinds.most_common(1)[0]
        for file in files:
            if _kind(file) != usual:
                yield file.fault(f"{_kind(file)}, which does not stack", f"{usual}, as in {count} others of its bucket")


def _kind(file: CacheFile) -> str:
    """What must be the same for all caches of a batch."""
    return f"{', '.join(sorted(map(base_of, file.header.shapes)))} of {by(file.grid or (0, 0))}"


def listing_faults(folder: Folder, names: set[str], unread: set[str]) -> Iterator[Fault]:
    """Caches that belong to no item of the dataset config, and items without a cache.

    Args:
        names: of all caches that the config's items make, for the models in the folder.
        unread: stems of items that could not be read now.
    """
    known = {fault.file for fault in folder.faults if fault.advice == RENAME}
    for name, file in folder.caches.items():
        if name not in names and name not in known and file.name.stem not in unread:
            yield Fault(name, "the dataset config names no such item", "a cache of one of its items", STALE)
    there = {*(fault.file for fault in folder.faults), *(file.name.file_name for file in folder.caches.values())}
    for name in sorted(names - there):
        yield Fault(name, "no such file", "a cache of an item in the dataset config")
