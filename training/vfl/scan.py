"""The index of a split's shards: where each picture lies, sorted by identity. It is made once and kept.

`ROOT/index/<split>.safetensors` belongs to shards of certain names, sizes and times. If one changes, it is made anew.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...kvae.errors import WeightsError
from ...kvae.files import Weights, save_weights
from ...kvae.foreign import parse_json
from ...kvae.paths import file_errors
from ..errors import UserError
from .pictures import MOST_BYTES
from .shards import identity_of, shard_files
from .tars import Entry, entries, tar_errors

FORMAT = "kvae-picture-index/1"
ARRAYS = {"shard": np.int32, "header": np.int64, "lead": np.int32, "size": np.int32}
MOST_LEAD = 1 << 20  # bytes from a picture's header to its data


@dataclass(frozen=True)
class Table:
    """All pictures of a split. Pictures of identity i are the rows `starts[i]` to `starts[i + 1]`, as they were packed.

    Attributes:
        files: the shards.
        identities: names, sorted.
        starts: int64 [identities + 1].
        shard, header, lead, size: [pictures]: the shard's number, where the picture's header begins in it, and how many
            bytes its header and its data have.
    """

    files: list[Path]
    identities: list[str]
    starts: np.ndarray
    shard: np.ndarray
    header: np.ndarray
    lead: np.ndarray
    size: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many pictures each identity has."""
        return dict(zip(self.identities, np.diff(self.starts).tolist(), strict=True))


def index_path(root: Path, split: str) -> Path:
    """Where the index of a split lies."""
    return root / "index" / f"{split}.safetensors"


def open_table(root: Path, split: str, key: str) -> Table:
    """The index of a split's shards, from its file, or made and kept if the folder can be written.

    Args:
        key: of the identity in the samples' JSON.

    Raises:
        UserError: there are no shards, or one is damaged.
        WeightsError: a shard cannot be read.
    """
    files = shard_files(root, split)
    if not files:
        raise UserError(
            f"{root}: no shards data/{split}/{split}-*.tar in it; make them by `python -m training vfl-pack`"
        )
    about = {"key": key, "shards": [_stamp(path) for path in files]}
    path = index_path(root, split)
    table = _kept(path, files, about)
    if table is None:
        table = scan(files, key)
        try:
            _keep(path, table, about)
        except WeightsError as error:
            print(f"the index is not kept, and the next run makes it again: {error}")
    return table


def scan(files: list[Path], key: str) -> Table:
    """Make the index of shards. It needs 32 bytes of memory for each picture.

    Raises:
        UserError: a shard is damaged, or a sample in it has no identity.
        WeightsError: a shard cannot be read.
    """
    columns = {name: array("q") for name in ("identity", *ARRAYS)}
    numbers: dict[str, int] = {}
    for i, path in enumerate(tqdm(files, desc="index", unit="shard", leave=False, disable=None)):
        for name, entry in identified(path, key):
            row = (numbers.setdefault(name, len(numbers)), i, entry.header, entry.offset - entry.header, entry.size)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    if not numbers:
        raise UserError(
            f"{files[0]}: no pictures in it, nor in the other shards; pack some by `python -m training vfl-pack`"
        )
    identities = sorted(numbers)
    rank = np.empty(len(numbers), np.int64)
    rank[[numbers[name] for name in identities]] = np.arange(len(numbers))
    identity = rank[np.frombuffer(columns.pop("identity"), np.int64)]
    order = np.argsort(identity, kind="stable")
    starts = np.searchsorted(identity[order], np.arange(len(identities) + 1))
    arrays = {name: np.frombuffer(columns[name], np.int64)[order].astype(kind) for name, kind in ARRAYS.items()}
    return Table(files, identities, starts.astype(np.int64), **arrays)


def identified(path: Path, key: str) -> Iterator[tuple[str, Entry]]:
    """Yield the samples of a shard, each with its identity.

    Raises:
        UserError: the shard is damaged, or a sample in it is incomplete or has no identity.
        WeightsError: the shard cannot be read.
    """
    with tar_errors(str(path)):
        for entry in entries(path):
            try:
                name = identity_of(entry.about, key)
            except ValueError as error:
                raise ValueError(f"{entry.id}.json: {error}") from None
            yield name, entry


def _stamp(path: Path) -> list[Any]:
    with file_errors(path):
        status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _keep(path: Path, table: Table, about: dict[str, Any]) -> None:
    texts = {"about": json.dumps(about), "identities": json.dumps(table.identities)}
    tensors = {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()}
    for name in ("starts", *ARRAYS):
        tensors[name] = torch.from_numpy(getattr(table, name))
    save_weights(path, tensors, {"format": FORMAT})


def _kept(path: Path, files: list[Path], about: dict[str, Any]) -> Table | None:
    """The index in a file, mapped into memory; None if there is none, or it is not of these shards."""
    try:
        weights = Weights(path)
        if weights.metadata.get("format") != FORMAT or parse_json(weights["about"].numpy().tobytes()) != about:
            return None
        identities = parse_json(weights["identities"].numpy().tobytes())
        arrays = {name: weights[name].numpy() for name in ("starts", *ARRAYS)}
        table = Table(files, identities, **arrays)
        return table if _is_sound(table, np.array([size for _, size, _ in about["shards"]])) else None
    except (WeightsError, ValueError, KeyError, TypeError):
        return None


def _is_sound(table: Table, sizes: np.ndarray) -> bool:
    """Whether every picture lies within its shard: the file may have come with the shards of others."""
    kinds = {"starts": np.int64, **ARRAYS}
    if any(getattr(table, name).dtype != kind or getattr(table, name).ndim != 1 for name, kind in kinds.items()):
        return False
    n = len(table.shard)
    if not len(table.header) == len(table.lead) == len(table.size) == n > 0:
        return False
    names = table.identities
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    starts = table.starts
    if len(starts) != len(names) + 1 or starts[0] or starts[-1] != n or (np.diff(starts) <= 0).any():
        return False
    if table.shard.min() < 0 or table.shard.max() >= len(sizes):
        return False
    if table.header.min() < 0 or table.lead.min() <= 0 or table.lead.max() > MOST_LEAD:
        return False
    if table.size.min() < 0 or table.size.max() > MOST_BYTES:
        return False
    return bool((table.header + table.lead + table.size <= sizes[table.shard]).all())
