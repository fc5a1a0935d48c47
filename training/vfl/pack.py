"""Pack pictures of characters into WebDataset's shards, with manifests, for the training of a Video-Free LoRA.

    python -m training vfl-pack --pictures-root pictures --output-root dataset

`pictures` holds a folder for each identity, and in it, however deep, jpg, jpeg, png and webp files. They are packed as
they are, each with a JSON that names its identity: the folder's name in lower case. `dataset` gets shards
(data/train/train-000000.tar …), manifests (manifest/train_manifest.csv …) and an index; the same for val.

Pack again after an interruption, or when you have more pictures: those that are packed stay where they are, and the
others are added in shards with new numbers. To take pictures out, delete their shards and pack again. Without
--pictures-root, the manifests are written anew from the shards, which may be of another program.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...kvae.errors import KVAEError
from ...kvae.paths import read_bytes
from ..errors import UserError, printable
from ..options import option
from ..runtime.ahead import in_order
from ..runtime.interrupts import BetweenSteps
from ..runtime.places import alone_in
from .folder import Found, find_pictures
from .packed import Packed, short_hash
from .pictures import MOST_BYTES, read_picture
from .scan import open_table
from .shards import (
    COUNT,
    IDENTITY_KEY,
    SOURCE,
    SPLITS,
    Picture,
    manifest_path,
    next_number,
    shard_files,
    shard_path,
    write_manifest,
    write_shard,
)

SHARD_BYTES = 256 << 20  # of pictures, held in memory for each split while packing


@dataclass
class VflPackConfig:
    output_root: str = option(..., "folder for shards, manifests and index", writes="folder")
    pictures_root: str = option("", "folder with a folder of pictures for each identity; without it, nothing is packed")
    val_share: float = option(0.1, "share of each identity's pictures for the split val", least=0, most=1)
    identity_key: str = option(IDENTITY_KEY, "key of the identity in a sample's JSON, and its column", metavar="KEY")


def run(config: VflPackConfig) -> int:
    """Pack the pictures that are not packed yet; return 0, or 1 if some were skipped.

    Raises:
        UserError: there are no pictures, none can be read, or a shard or a manifest is damaged.
        WeightsError: something cannot be written.
    """
    key, out = config.identity_key, Path(config.output_root)
    if key in (COUNT, SOURCE):
        raise UserError(f"--identity-key is {key}, which has another meaning; choose another key")
    found = find_pictures(Path(config.pictures_root)) if config.pictures_root else []
    with alone_in(out, "vfl-pack"):
        packed = Packed(out, key)
        if not found and not packed.pictures:
            raise UserError(f"{out}: no shards in it; name the pictures to pack by --pictures-root")
        todo = [each for each in found if not packed.has_source(each.order)]
        job = _Job(config, packed)
        job.pack(todo)
        job.say_skipped()
        if job.skipped and not packed.pictures:
            raise UserError(f"none of the {len(todo)} pictures could be packed")
        for split in SPLITS:
            if shard_files(out, split):
                _finish_split(out, split, key)
    if found:
        counts = f"{job.made:,} pictures packed, {len(found) - len(todo):,} already there, {len(job.skipped):,} skipped"
        print(f"{counts}, {job.doubles:,} doubles left out → {out}")
    return 1 if job.skipped else 0


class _Job:
    """The work on pictures that are not packed yet.

    Attributes:
        waiting: pictures of each split that are not in a shard yet, of `held` bytes.
    """

    def __init__(self, config: VflPackConfig, packed: Packed):
        self.root, self.out, self.key = Path(config.pictures_root), Path(config.output_root), config.identity_key
        self.share, self.packed = config.val_share, packed
        self.waiting: dict[str, list[Picture]] = {split: [] for split in SPLITS}
        self.held = dict.fromkeys(SPLITS, 0)
        self.made, self.doubles = 0, 0
        self.skipped: list[str] = []

    def pack(self, todo: list[Found]) -> None:
        """Pack pictures, one after the other. Several are read and checked at a time."""
        read = in_order(self._read, todo)
        with BetweenSteps() as interrupts, closing(read):
            for each, data in zip(todo, tqdm(read, "pack", len(todo), unit="picture", disable=None), strict=True):
                if isinstance(data, str):
                    self._skip(each, data)
                else:
                    self._add(each, data)
                interrupts.check()
            for split in SPLITS:
                self._write(split)

    def _read(self, found: Found) -> bytes | str:
        """The bytes of a picture that can be read, or why it is left out."""
        path = self.root / found.source
        try:
            found.identity()
            data = read_bytes(path, MOST_BYTES)
            read_picture(data)
            return data
        except (KVAEError, ValueError) as error:
            return str(error).removeprefix(f"{path}: ")

    def _add(self, found: Found, data: bytes) -> None:
        identity, content = found.identity(), short_hash(data)
        if (other := self.packed.identity_of(content)) == identity:
            self.doubles += 1
        elif other is not None:
            self._skip(found, f"the same picture as one of {other!r}; delete one of them")
        else:
            split = self.packed.add(identity, content, self.share)
            suffix = Path(found.source).suffix[1:].lower()
            self.waiting[split].append(Picture(f"{content:016x}", suffix, data, identity, found.source))
            self.held[split] += len(data)
            self.made += 1
            if self.held[split] >= SHARD_BYTES:
                self._write(split)

    def _write(self, split: str) -> None:
        """Write what waits as a shard, and the manifest with it, so that an interrupted run leaves both alike."""
        if self.waiting[split]:
            write_shard(shard_path(self.out, split, next_number(self.out, split)), self.key, self.waiting[split])
            write_manifest(manifest_path(self.out, split), self.key, self.packed.counts[split])
            self.waiting[split].clear()
            self.held[split] = 0

    def _skip(self, found: Found, why: str) -> None:
        self.skipped.append(f"{self.root / found.source}: {why}")

    def say_skipped(self) -> None:
        """Name the pictures that were left out."""
        for line in self.skipped:
            print(printable(f"skipped: {line}"), file=sys.stderr)


def _finish_split(out: Path, split: str, key: str) -> None:
    """Make the index of a split, count its manifest from it, and say what there is."""
    counts = open_table(out, split, key).counts()
    write_manifest(manifest_path(out, split), key, counts)
    least, most = min(counts.values()), max(counts.values())
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    shards = len(shard_files(out, split))
    where = f"{shards:,} shards" if shards > 1 else "1 shard"
    print(f"{split}: {sum(counts.values()):,} pictures of {len(counts):,} identities, {each} of each, in {where}")
