"""musubi-tuner's dataset config, TOML or JSON: tables `[general]`, which may be missing, and `[[datasets]]`.

A value of a dataset wins over one of general, which wins over the default. Keys, types and defaults are those of
musubi-tuner 0.3.4 (dataset/config_utils.py). What fails there only while clips are read is refused here.
"""

from __future__ import annotations

import logging
import math
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kvae.foreign import parse_object
from ...kvae.paths import read_text
from ..errors import UserError

logger = logging.getLogger(__name__)

HEAD, CHUNK, SLIDE, UNIFORM, FULL = EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
LEAST_SIDE = 32  # of a square with the area of `resolution`: below, musubi-tuner's buckets divide by zero
MOST_SIDE = 1 << 16  # pixels
DEFAULT_RESOLUTION = (960, 544)


@dataclass(frozen=True)
class Dataset:
    """One table of `[[datasets]]`.

    Attributes:
        label: what messages call it.
        kind: "image" or "video".
        directory, jsonl: where the media are; of the two, one is empty.
        resolution: width, height in pixels.
        target_frames: rising, each 4n + 1.
    """

    label: str
    kind: str
    directory: str
    jsonl: str
    cache_directory: str
    control_directory: str
    caption_extension: str
    resolution: tuple[int, int]
    enable_bucket: bool
    bucket_no_upscale: bool
    target_frames: tuple[int, ...]
    frame_extraction: str
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | None

    @property
    def is_video(self) -> bool:
        return self.kind == "video"


def read_config(path: str | os.PathLike) -> list[Dataset]:
    """The datasets of a config file.

    Raises:
        UserError: the file is neither TOML nor JSON, has an unknown key or a value of another type, or asks for what
            musubi-tuner cannot do.
        WeightsError: the file cannot be read.
    """
    tables = _parsed(Path(path))
    unknown = tables.keys() - {"general", "datasets"}
    if unknown:
        raise UserError(f"{path}: has {_listed(unknown)}; expected the tables [general] and [[datasets]] only")
    general = _checked(f"{path}: [general]", tables.get("general", {}), _BOTH)
    datasets = tables.get("datasets", [])
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{path}: has no [[datasets]]; expected at least one")
    made = [_dataset(f"{path}: [[datasets]] {i}", each, general) for i, each in enumerate(datasets, 1)]
    _check_apart(made)
    return made


def _parsed(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"{path}: expected a .toml or a .json file")
    text = read_text(path)
    try:
        return tomllib.loads(text) if suffix == ".toml" else parse_object(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not {suffix[1:].upper()} ({error})") from None


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _sides(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and len(value) == 2 and _whole_numbers(value))


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) for each in value)


# kinds of values: what a message calls them, and their test; as in musubi-tuner, true and false are whole numbers, and
# a whole number is not a number with a point
_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a text", _is(str))
_FLAG: _Kind = ("true or false", _is(bool))
_WHOLE: _Kind = ("a whole number", _is(int))
_NUMBER: _Kind = ("a number with a point, such as 30.0", _is(float))
_NUMBERS: _Kind = ("a list of whole numbers", _whole_numbers)
_SIDES: _Kind = ("a whole number, or [width, height]", _sides)

_BOTH = {
    "resolution": _SIDES,
    "caption_extension": _TEXT,
    "batch_size": _WHOLE,
    "num_repeats": _WHOLE,
    "enable_bucket": _FLAG,
    "bucket_no_upscale": _FLAG,
}
_PLACES = {"cache_directory": _TEXT, "control_directory": _TEXT, "fp_latent_window_size": _WHOLE}
_IMAGE = {
    **_BOTH,
    **_PLACES,
    "image_directory": _TEXT,
    "image_jsonl_file": _TEXT,
    # for models that are not cached here
    "multiple_target": _FLAG,
    "fp_1f_clean_indices": _NUMBERS,
    "fp_1f_target_index": _WHOLE,
    "fp_1f_no_post": _FLAG,
    "no_resize_control": _FLAG,
    "control_resolution": _SIDES,
    # older names of the last two
    "flux_kontext_no_resize_control": _FLAG,
    "qwen_image_edit_no_resize_control": _FLAG,
    "qwen_image_edit_control_resolution": _SIDES,
}
_VIDEO = {
    **_BOTH,
    **_PLACES,
    "video_directory": _TEXT,
    "video_jsonl_file": _TEXT,
    "target_frames": _NUMBERS,
    "frame_extraction": _TEXT,
    "frame_stride": _WHOLE,
    "frame_sample": _WHOLE,
    "max_frames": _WHOLE,
    "source_fps": _NUMBER,
}


def _checked(label: str, table: Any, kinds: dict[str, _Kind]) -> dict[str, Any]:
    """The table, if it has these keys only, with values of these kinds."""
    if not isinstance(table, dict):
        raise UserError(f"{label} is {_short(table)}; expected a table")
    unknown = table.keys() - kinds.keys()
    if unknown:
        raise UserError(f"{label} has {_listed(unknown)}; expected {', '.join(kinds)}")
    for key, value in table.items():
        what, fits = kinds[key]
        if not fits(value):
            raise UserError(f"{label}: {key} is {_short(value)}; expected {what}")
    return table


def _dataset(label: str, table: Any, general: dict[str, Any]) -> Dataset:
    keys = table.keys() if isinstance(table, dict) else ()
    is_video = "video_directory" in keys or "video_jsonl_file" in keys
    kind = "video" if is_video else "image"
    media = {key for key in keys if key.endswith(("_directory", "_jsonl_file")) and key.startswith(("video", "image"))}
    if is_video and any(key.startswith("image") for key in media):
        raise UserError(f"{label} has {_listed(media)}; expected a table for videos and another for images")
    table = general | _checked(label, table, _VIDEO if is_video else _IMAGE)
    directory, jsonl = table.get(f"{kind}_directory", ""), table.get(f"{kind}_jsonl_file", "")
    if not directory and not jsonl:
        raise UserError(
            f"{label} names no media; expected image_directory, image_jsonl_file, video_directory or video_jsonl_file"
        )
    made = Dataset(
        label=label,
        kind=kind,
        directory=directory,
        jsonl="" if directory else jsonl,
        cache_directory=table.get("cache_directory", directory),
        control_directory=table.get("control_directory", ""),
        caption_extension=table.get("caption_extension", ""),
        resolution=_resolution(label, table.get("resolution", list(DEFAULT_RESOLUTION))),
        enable_bucket=table.get("enable_bucket", False),
        bucket_no_upscale=table.get("enable_bucket", False) and table.get("bucket_no_upscale", False),
        target_frames=_target_frames(label, table.get("target_frames", [1])),
        frame_extraction=table.get("frame_extraction", HEAD),
        frame_stride=table.get("frame_stride", 1),
        frame_sample=table.get("frame_sample", 1),
        max_frames=table.get("max_frames", 129),
        source_fps=table.get("source_fps"),
    )
    _check_dataset(made, table)
    return made


def _resolution(label: str, value: int | list[int]) -> tuple[int, int]:
    width, height = value if isinstance(value, list) else (value, value)
    if min(width, height) < 1 or max(width, height) > MOST_SIDE or math.isqrt(width * height) < LEAST_SIDE:
        raise UserError(
            f"{label}: resolution is {width}x{height}; expected at least the area of {LEAST_SIDE}x{LEAST_SIDE} pixels, "
            f"and sides of at most {MOST_SIDE:,}"
        )
    return width, height


def _target_frames(label: str, counts: list[int]) -> tuple[int, ...]:
    if not counts or min(counts) < 1:
        raise UserError(f"{label}: target_frames is {_short(counts)}; expected at least one number, each 1 or more")
    rounded = tuple(sorted({(count - 1) // 4 * 4 + 1 for count in counts}))
    if rounded != tuple(sorted(set(counts))):
        logger.warning("%s: target_frames are rounded down to 4n + 1: %s", label, ", ".join(map(str, rounded)))
    return rounded


def _check_dataset(made: Dataset, table: dict[str, Any]) -> None:
    """Refuse what would fail later, or silently cache nothing."""
    label = made.label
    if made.frame_extraction not in EXTRACTIONS:
        raise UserError(
            f"{label}: frame_extraction is {_short(made.frame_extraction)}; expected one of {', '.join(EXTRACTIONS)}"
        )
    for key in ("frame_stride", "frame_sample", "max_frames"):
        if getattr(made, key) < 1:
            raise UserError(f"{label}: {key} is {getattr(made, key)}; expected 1 or more")
    if made.source_fps is not None and not (math.isfinite(made.source_fps) and made.source_fps > 0):
        raise UserError(f"{label}: source_fps is {made.source_fps}; expected frames per second, above 0")
    if made.directory and not made.caption_extension:
        raise UserError(f'{label}: caption_extension is missing; expected one with a directory, such as ".txt"')
    if not made.cache_directory:
        raise UserError(f"{label}: cache_directory is missing; expected one with {made.kind}_jsonl_file")
    if table.get("multiple_target"):
        raise UserError(f"{label}: multiple_target is for Qwen-Image-Layered only; remove it")
    for text in (made.directory, made.jsonl, made.cache_directory, made.control_directory):
        if "\0" in text:
            raise UserError(f"{label}: {_short(text)} is not a name that a file can have")


def _check_apart(datasets: list[Dataset]) -> None:
    """Refuse two datasets with one cache directory: the caches of each would be stale files to the other."""
    seen: dict[str, str] = {}
    for each in datasets:
        place = os.path.realpath(each.cache_directory)
        if place in seen:
            raise UserError(
                f"{each.label}: cache_directory is {each.cache_directory}, as in {seen[place].rsplit(': ', 1)[-1]}; "
                "expected a folder for each dataset (without cache_directory it is the folder of the media)"
            )
        seen[place] = each.label


def _listed(names: set[str]) -> str:
    return ", ".join(_short(name) for name in sorted(names)[:3])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
