"""The media of a dataset, as musubi-tuner lists them, and the faults for which it would stop.

Rules are those of musubi-tuner 0.3.4 (dataset/datasources.py). Folders are not searched below. Controls must be there,
but none of the models that are cached here uses them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ...kvae.foreign import parse_object
from ...kvae.paths import file_errors, read_text
from ..errors import UserError
from .config import Dataset

JPEG_XL = ("jxlpy", "pillow_jxl")  # Pillow's plug-ins for JPEG XL
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Item:
    """An image, a video, or a folder of images that is a video.

    Attributes:
        path: as the config or the jsonl file spells it.
        stem: the start of the names of its caches; empty for a folder that is written with a "/" at its end.
    """

    path: str
    stem: str


def find_items(dataset: Dataset) -> list[Item]:
    """The media of a dataset, in musubi-tuner's order.

    Raises:
        UserError: there is none, a caption or a control is missing, or a line of the jsonl file is not what it should
            be.
        WeightsError: a folder or the jsonl file cannot be read.
    """
    paths = _in_folder(dataset) if dataset.directory else _in_jsonl(dataset)
    if not paths:
        raise UserError(f"{dataset.label}: no {dataset.kind}s in {dataset.directory or dataset.jsonl}")
    return [Item(path, stem_of(path)) for path in paths]


def stem_of(path: str) -> str:
    """The base name without its last extension."""
    return os.path.splitext(os.path.basename(path))[0]


def images_in(folder: str) -> list[str]:
    """The images of a folder, sorted.

    Raises:
        WeightsError: the folder cannot be read.
    """
    return _paths(folder, (*IMAGES, ".jxl") if any(map(find_spec, JPEG_XL)) else IMAGES)


def _paths(folder: str, extensions: Iterable[str]) -> list[str]:
    """Everything in a folder with one of these extensions, in lower or in upper case, except hidden names; sorted."""
    endings = tuple(spelled for each in extensions for spelled in (each, each.upper()))
    with file_errors(folder):
        names = os.listdir(folder)
    return sorted(os.path.join(folder, name) for name in names if name.endswith(endings) and not name.startswith("."))


def _in_folder(dataset: Dataset) -> list[str]:
    if not os.path.isdir(dataset.directory):
        raise UserError(f"{dataset.label}: {dataset.directory}: no such folder")
    if dataset.is_video:
        paths = _paths(dataset.directory, VIDEOS)
    else:
        paths = _with_caption(dataset, images_in(dataset.directory))
    extension = dataset.caption_extension
    _check_all_there(
        f"{dataset.label}: no caption ({extension})", paths, lambda path: os.path.splitext(path)[0] + extension
    )
    if dataset.control_directory:
        (_check_video_controls if dataset.is_video else _check_image_controls)(dataset, paths)
    return paths


def _with_caption(dataset: Dataset, paths: list[str]) -> list[str]:
    """The images for which there is a caption; the others are left out silently, unlike videos."""
    stems = {stem_of(path) for path in _names_ending(dataset.directory, dataset.caption_extension)}
    return [path for path in paths if stem_of(path) in stems]


def _names_ending(folder: str, ending: str) -> list[str]:
    with file_errors(folder):
        return [name for name in os.listdir(folder) if name.endswith(ending) and not name.startswith(".")]


def _check_all_there(what: str, paths: list[str], needed: Callable[[str], str]) -> None:
    """Refuse a dataset in which a file that an item needs is missing.

    Args:
        needed: the path of the file that belongs to an item; "" if there is none.
    """
    missing = [path for path in paths if not (needed(path) and os.path.exists(needed(path)))]
    if missing:
        raise UserError(f"{what} for {len(missing)} of {len(paths)}, first {missing[0]}; add it, or remove the media")


def _check_video_controls(dataset: Dataset, paths: list[str]) -> None:
    """Each video needs a control: of its name, else a folder of its stem, else with another extension."""

    def control(path: str) -> str:
        name = os.path.join(dataset.control_directory, os.path.basename(path))
        body = os.path.join(dataset.control_directory, stem_of(path))
        others = [body + spelled for each in VIDEOS for spelled in (each, each.upper())]
        folder = [body] if os.path.isdir(body) else []
        return next((each for each in (name, *folder, *others) if os.path.exists(each)), "")

    _check_all_there(f"{dataset.label}: no control in {dataset.control_directory}", paths, control)


def _check_image_controls(dataset: Dataset, paths: list[str]) -> None:
    """Each image needs a control whose name starts with its stem and "." or "_"; longer stems choose first."""
    left, chosen = set(images_in(dataset.control_directory)), {}
    for path in sorted(paths, key=lambda each: len(os.path.basename(each)), reverse=True):
        starts = stem_of(path) + ".", stem_of(path) + "_"
        found = {each for each in left if os.path.basename(each).startswith(starts)}
        left -= found
        for each in found:
            number = stem_of(each).rsplit("_", 1)[-1]
            if stem_of(each) != stem_of(path) and not number.isdigit():
                raise UserError(f"{dataset.label}: {each}: expected {stem_of(path)} or {stem_of(path)}_NUMBER")
        chosen[path] = next(iter(found), "")
    _check_all_there(f"{dataset.label}: no control in {dataset.control_directory}", paths, chosen.__getitem__)


def _in_jsonl(dataset: Dataset) -> list[str]:
    """The paths in a jsonl file, relative to the working directory."""
    lines = read_text(dataset.jsonl).split("\n")
    entries = [_entry(dataset, n, line) for n, line in enumerate(lines[: None if lines[-1] else -1], 1)]
    paths = [_media(dataset, entry) for entry in entries]
    controls = [_control(dataset, entry) for entry in entries]
    if any(each is not None for each in controls):
        wanted = [path for path, each in zip(paths, controls, strict=True) if each != ""]
        known = dict(zip(paths, controls, strict=True))
        _check_all_there(f"{dataset.jsonl}: no control_path, or no such file,", wanted, lambda path: known[path] or "")
    return paths


def _control(dataset: Dataset, entry: dict[str, Any]) -> str | None:
    """The first control of an entry; None if it names none. A video's may be empty."""
    if dataset.is_video:
        return str(entry["control_path"] or "") if "control_path" in entry else None
    numbers = [int(found[1]) for key in entry if (found := re.fullmatch(r"control_path_(\d{1,9})", key))]
    keys = ["control_path", *(f"control_path_{n}" for n in sorted(numbers))]
    return next((str(entry[key]) for key in keys if key in entry), None)


def _entry(dataset: Dataset, number: int, line: str) -> dict[str, Any]:
    try:
        entry = parse_object(line)
    except ValueError as error:
        raise UserError(f"{dataset.jsonl}: line {number} is not a JSON object ({error})") from None
    for key, text in (("caption", entry.get("caption")), (f"{dataset.kind}_path", _media(dataset, entry))):
        if not isinstance(text, str) or "\0" in text or (not text and key != "caption"):
            raise UserError(f"{dataset.jsonl}: line {number} has no {key}; expected a text")
    return entry


def _media(dataset: Dataset, entry: dict[str, Any]) -> Any:
    return entry.get(f"{dataset.kind}_path", None if dataset.is_video else entry.get("image_path_0"))
