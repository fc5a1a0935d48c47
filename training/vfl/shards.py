"""The layout of a data set: WebDataset's tars, and a manifest that counts them.

    ROOT/data/train/train-000000.tar …        <id>.jpg (or jpeg, png, webp) and <id>.json for each picture
    ROOT/data/val/val-000000.tar …
    ROOT/manifest/train_manifest.csv …        columns: the identity's key, count, and any others that users add

A manifest's rows number the identities. Its counts are counted in the shards, never in the pictures' folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...kvae.paths import read_text, write_text, written_whole
from ..errors import UserError

SPLITS = ("train", "val")
IDENTITY_KEY = "identity"
MOST_NAME = 1000  # characters of an identity
COUNT = "count"
SOURCE = "source"  # key of a picture's path in the folder it was packed from


def shard_path(root: Path, split: str, number: int) -> Path:
    """Where a shard of a split lies."""
    return root / "data" / split / f"{split}-{number:06d}.tar"


def shard_files(root: Path, split: str) -> list[Path]:
    """The shards of a split, sorted."""
    return sorted((root / "data" / split).glob(f"{split}-*.tar"))


def next_number(root: Path, split: str) -> int:
    """A number above those of all shards of a split."""
    found = (re.fullmatch(rf"{split}-(\d+)", path.stem) for path in shard_files(root, split))
    return max((int(match[1]) for match in found if match), default=-1) + 1


@dataclass(frozen=True)
class Picture:
    """A picture to be written.

    Attributes:
        id: its name in the shards, without dots.
        data: its file.
        source: its path in the folder of all pictures.
    """

    id: str
    suffix: str
    data: bytes
    identity: str
    source: str


def write_shard(path: Path, key: str, pictures: list[Picture]) -> None:
    """Write a shard, completely or not at all. The same pictures give the same bytes.

    Raises:
        UserError: webdataset is not installed.
        WeightsError: the file cannot be written.
    """
    try:
        from webdataset import TarWriter
    except ImportError:
        raise UserError("webdataset is not installed: pip install -r requirements-vfl.txt") from None
    with (
        written_whole(path) as partial,
        partial.open("wb") as file,
        TarWriter(file, user="", group="", mode=0o644, encoder=False, mtime=0) as tar,
    ):
        for picture in pictures:
            about = json.dumps({key: picture.identity, SOURCE: picture.source}).encode()
            tar.write({"__key__": picture.id, picture.suffix: picture.data, "json": about})


def identity_of(about: Mapping[str, Any], key: str) -> str:
    """The identity in a sample's JSON: a text, lower-cased and stripped, or a whole number, as text.

    Raises:
        ValueError: it has none.
    """
    value = about.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        keys = ", ".join(sorted(about)[:8]) or "none"
        raise ValueError(f"no identity under {key!r} (its keys: {keys}); name the right one by --identity-key")
    return identity_name(value)


def identity_name(text: str) -> str:
    """A text as the name of an identity.

    Raises:
        ValueError: it is empty, too long, or not Unicode.
    """
    name = text.strip().lower()
    if not name or len(name) > MOST_NAME:
        raise ValueError(f"an identity named {name[:40]!r}; expected 1 to {MOST_NAME} characters")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"an identity named {name!r}, which is not UTF-8; rename it") from None
    return name


@dataclass(frozen=True)
class Manifest:
    """The identities of a split, in order, and how many pictures each has.

    Attributes:
        columns: other columns of the file, by name, such as a group of each identity.
    """

    key: str
    counts: dict[str, int]
    columns: dict[str, list[str]] = field(default_factory=dict)


def manifest_path(root: Path, split: str) -> Path:
    """Where the manifest of a split lies."""
    return root / "manifest" / f"{split}_manifest.csv"


def read_manifest(path: Path, key: str = IDENTITY_KEY) -> Manifest:
    """Read a manifest.

    Raises:
        UserError: there is none, or it is malformed.
        WeightsError: it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such manifest; write it by `python -m training vfl-pack --output-root ROOT`")
    text = read_text(path)
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
        if key not in header or COUNT not in header or len(set(header)) < len(header):
            raise ValueError(f"its columns are {', '.join(header) or 'none'}; expected {key}, {COUNT}")
        if wrong := next((row for row in rows if len(row) != len(header)), None):
            raise ValueError(f"a row of {len(wrong)} columns: {','.join(wrong)[:60]}")
        table = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
        names = [identity_name(name) for name in table.pop(key, [])]
        counts = dict(zip(names, map(_count, table.pop(COUNT, [])), strict=True))
        if not names or len(counts) < len(names):
            raise ValueError("an identity has two rows" if names else "it lists no identity")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a manifest ({error}); correct it, or delete it and run vfl-pack") from None
    return Manifest(key, counts, table)


def write_manifest(path: Path, key: str, counts: Mapping[str, int]) -> None:
    """Write a manifest, sorted by identity, completely or not at all. Columns that users added to the one before stay.

    Raises:
        UserError: the manifest before is malformed.
        WeightsError: the file cannot be written.
    """
    before = read_manifest(path, key) if path.exists() else Manifest(key, {})
    places = {name: i for i, name in enumerate(before.counts)}
    more = list(before.columns)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([key, COUNT, *more])
    for name in sorted(counts):
        kept = [before.columns[column][places[name]] if name in places else "" for column in more]
        writer.writerow([name, counts[name], *kept])
    write_text(path, text.getvalue())


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,11}", text.strip()):
        raise ValueError(f"a count of {text[:20]!r}; expected a number of at least 1")
    return int(text)
