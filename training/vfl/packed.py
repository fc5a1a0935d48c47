"""What a data set holds already, so that each picture is packed once, and each identity is shared out to the splits."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .scan import identified
from .shards import SOURCE, SPLITS, manifest_path, read_manifest, shard_files


def short_hash(data: bytes) -> int:
    """The first 64 bits of the SHA-256 hash."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def source_hash(source: str, size: int) -> int:
    """A number for the path of a picture in its folder, and its size in bytes."""
    return short_hash(f"{source}\0{size}".encode(errors="surrogatepass"))


class Packed:
    """The pictures of both splits. It needs about 30 bytes of memory for each, and more for those that are added.

    Args:
        key: of the identity in the samples' JSON.

    Attributes:
        counts: pictures of each identity, by split.

    Raises:
        UserError: a shard or a manifest is damaged, or a sample has no identity.
        WeightsError: one of them cannot be read.
    """

    def __init__(self, root: Path, key: str):
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._names: dict[str, int] = {}
        self._added: dict[int, str] = {}
        rows = tuple(array(kind) for kind in "QQq")  # source, content, number of the identity
        for split in SPLITS:
            if (path := manifest_path(root, split)).exists():
                read_manifest(path, key)  # or the run would fail at its end
            for path in tqdm(shard_files(root, split), f"look at {split}", unit="shard", leave=False, disable=None):
                self._look(path, key, self.counts[split], rows)
        sources, contents, numbers = (np.array(row) for row in rows)
        self._sources, order = np.sort(sources), np.argsort(contents)
        self._contents, self._numbers, self._identities = contents[order], numbers[order], list(self._names)

    @property
    def pictures(self) -> int:
        """How many there are."""
        return sum(counts.total() for counts in self.counts.values())

    def has_source(self, number: int) -> bool:
        """Whether a file of this path and size was packed, by its `source_hash`."""
        return _place(self._sources, number) is not None

    def identity_of(self, content: int) -> str | None:
        """The identity of a picture of this content, by its `short_hash`; None if there is none."""
        if (place := _place(self._contents, content)) is not None:
            return self._identities[self._numbers[place]]
        return self._added.get(content)

    def add(self, identity: str, content: int, share: float) -> str:
        """Note a picture that is packed now; return its split.

        Args:
            share: of each identity's pictures that go to val, to the nearest picture.
        """
        val, train = self.counts["val"][identity], self.counts["train"][identity]
        split = "val" if int(share * (val + train + 1) + 0.5) > val else "train"
        self.counts[split][identity] += 1
        self._added[content] = identity
        return split

    def _look(self, path: Path, key: str, counts: Counter[str], rows: tuple[array, ...]) -> None:
        sources, contents, numbers = rows
        for name, entry in identified(path, key):
            counts[name] += 1
            number = self._names.setdefault(name, len(self._names))
            if isinstance(source := entry.about.get(SOURCE), str):
                sources.append(source_hash(source, entry.size))
            if re.fullmatch(r"[0-9a-f]{16}", entry.id):  # not those of another program
                contents.append(int(entry.id, 16))
                numbers.append(number)


def _place(numbers: np.ndarray, number: int) -> int | None:
    """Where a number is in a sorted array."""
    place = int(np.searchsorted(numbers, np.uint64(number)))
    return place if place < len(numbers) and numbers[place] == np.uint64(number) else None
