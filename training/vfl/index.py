"""The law of sampling over shards on a disk: every identity equally often, then its pictures equally often.

Sample k of a run is a pure function of a seed and k. So any number of processes see one sequence, and a resumed run
goes on exactly.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...kvae.paths import file_errors
from ..errors import UserError
from .draws import Draws
from .pictures import PictureError, read_picture
from .scan import Table, open_table
from .shards import IDENTITY_KEY, manifest_path, read_manifest
from .tars import split_name, tar_errors

Read = Callable[[bytes], Any]  # from a picture's file to what the caller needs; a PictureError leaves the picture out


@dataclass(frozen=True)
class Sample:
    """A picture of an identity.

    Attributes:
        id: its name in the shards; never a path.
        identity: number of the identity, by its row in the manifest.
        picture: what the caller's `read` made of its file.
        secondary: another picture of the identity, if one was asked for and there is one.
        skipped: the pictures that were left out on the way, as "id: reason".
    """

    id: str
    identity: int
    picture: Any
    secondary: Any = None
    skipped: tuple[str, ...] = ()


class Index:
    """The pictures of one split, by identity. Its methods may be called from several threads and processes at once.

    Args:
        root: the data set, as `shards` describes it.
        key: of the identity in the samples' JSON and in the manifest.

    Attributes:
        identities: their names, in the order of the manifest.
        counts: int64 [identities], pictures of each.

    Raises:
        UserError: there are no shards or no manifest, one of them is damaged, or they do not fit each other.
        WeightsError: a file cannot be read.
    """

    def __init__(self, root: str | Path, split: str, key: str = IDENTITY_KEY):
        path = manifest_path(Path(root), split)
        manifest = read_manifest(path, key)
        self.table: Table = open_table(Path(root), split, key)
        found = self.table.counts()
        for name in sorted(found.keys() | manifest.counts.keys()):
            if found.get(name) != manifest.counts.get(name):
                held, said = found.get(name, 0), manifest.counts.get(name, 0)
                raise UserError(
                    f"{path}: {said} pictures of {name!r}, and {held} in the shards; write it anew by "
                    "`python -m training vfl-pack`"
                )
        self.identities, self.columns = list(manifest.counts), manifest.columns
        rows = {name: i for i, name in enumerate(self.table.identities)}
        self._rows = np.array([rows[name] for name in self.identities])
        self.counts = np.diff(self.table.starts)[self._rows]

    def sample(self, seed: int, k: int, p_secondary: float = 0.0, read: Read = read_picture) -> Sample:
        """Sample k of a run.

        Args:
            p_secondary: the probability of a secondary picture.

        Raises:
            UserError: no picture of the identity can be read.
            WeightsError: a shard cannot be read.
        """
        draws = Draws(seed, "sample", k)
        identity = draws.below(len(self.identities))
        wanted = 2 if draws.unit() < p_secondary else 1
        skipped: list[str] = []
        found = list(islice(self._readable(identity, draws, read, skipped), wanted))
        if not found:
            raise UserError(
                f"none of the {self.counts[identity]} pictures of {self.identities[identity]!r} can be read "
                f"({skipped[0]}); take this identity out, and pack the others again"
            )
        first, *other = found
        return replace(first, secondary=other[0].picture if other else None, skipped=tuple(skipped))

    def pictures(self, identity: int, draws: Draws, count: int, read: Read = read_picture) -> list[Sample]:
        """Different pictures of an identity, in random order.

        Raises:
            UserError: fewer can be read.
            WeightsError: a shard cannot be read.
        """
        samples: list[Sample] = []
        skipped: list[str] = []
        for sample in islice(self._readable(identity, draws, read, skipped), count):
            samples.append(replace(sample, skipped=tuple(skipped)))
            skipped.clear()
        if len(samples) < count:
            raise UserError(
                f"{self.identities[identity]!r}: {len(samples)} of its {self.counts[identity]} pictures can be read; "
                f"expected {count}"
            )
        return samples

    def at(self, identity: int, i: int, read: Read = read_picture) -> Sample:
        """Picture `i` of an identity, in the order in which they were packed.

        Raises:
            PictureError: it cannot be read.
            WeightsError: the shard cannot be read.
        """
        name, data = self._file(int(self.table.starts[self._rows[identity]]) + i)
        try:
            return Sample(name, identity, read(data))
        except PictureError as error:
            raise PictureError(f"{name}: {error}") from None

    def _readable(self, identity: int, draws: Draws, read: Read, skipped: list[str]) -> Iterator[Sample]:
        """Yield the pictures of an identity in random order, and note those that cannot be read."""
        for i in draws.shuffled(int(self.counts[identity])):
            try:
                sample = self.at(identity, i, read)
            except PictureError as error:
                skipped.append(str(error))
            else:
                yield sample

    def _file(self, row: int) -> tuple[str, bytes]:
        """The id and the bytes of a picture."""
        table = self.table
        path, lead, size = table.files[table.shard[row]], int(table.lead[row]), int(table.size[row])
        with file_errors(path), path.open("rb") as file:
            file.seek(int(table.header[row]))
            block = file.read(lead + size)
        with tar_errors(str(path)):
            if len(block) < lead + size:
                raise ValueError("cut short since it was indexed; pack its pictures again")
            first = tarfile.TarFile(fileobj=io.BytesIO(block[:lead])).next()
            if not (name := split_name(first.name if first else "")[0]):
                raise ValueError("changed since it was indexed; pack its pictures again")
        return name, block[lead:]


def pictures_hash(*indexes: Index) -> str:
    """A hash that changes with the identities, the number or the places of the pictures."""
    digest = hashlib.sha256()
    for index in indexes:
        table = index.table
        digest.update(json.dumps([index.identities, [path.name for path in table.files]]).encode())
        for array in (index.counts, table.starts, table.shard, table.header, table.size):
            digest.update(array.tobytes())
    return digest.hexdigest()
