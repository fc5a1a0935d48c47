"""The law of sampling over shards that are read as streams, from another machine: rejection, by webdataset.

Shards are drawn at random. A picture of an identity is accepted with the probability min_count / count, by the
manifest: so every identity is accepted equally often. What each worker draws depends on the seed, the epoch, its
process and its number, and advances with every picture.
"""

from __future__ import annotations

import random
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlparse

import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset
from webdataset.gopen import gopen
from webdataset.utils import pytorch_worker_info

from ...kvae.errors import KVAEError
from ..errors import UserError
from .draws import Draws
from .index import Read, Sample
from .pictures import PictureError, read_picture
from .shards import Manifest, identity_of
from .tars import Entry, samples

SCHEMES = ("", "file", "http", "https", "hf", "gs", "ais")  # never pipe:, which runs a command
MOST_EMPTY = 5  # shards, one after the other, that give nothing
MOST_UNREADABLE = 100  # pictures, one after the other
SHUFFLED = 128  # pictures, as files, that each worker holds to mix them
SECONDARIES = 128  # identities of which each worker holds a picture


def shard_urls(text: str) -> list[str]:
    """The shards that an option names: `https://host/train-{000000..000041}.tar`, or several with `::` between them.

    Raises:
        UserError: there are none, or one is nothing to read from.
    """
    urls = wds.shardlists.expand_urls(text)
    for url in urls:
        if not url or urlparse(url).scheme not in SCHEMES:
            raise UserError(
                f"{url!r} is no shard; expected a path, or an address that starts with {', '.join(SCHEMES[1:])}"
            )
    return urls


@dataclass(frozen=True)
class Failure:
    """What ended a worker. An exception would reach the trainer as many lines."""

    message: str


class Stream(IterableDataset):
    """Samples without end.

    Args:
        urls: the shards; every process names all of them.
        manifest: of the same shards.
        epoch: another number gives another sequence.
        p_secondary: the probability of a secondary picture: the one of the identity that the worker accepted last, if
            it holds one and it is not the same picture.
    """

    def __init__(
        self,
        urls: list[str],
        manifest: Manifest,
        seed: int,
        epoch: int = 0,
        p_secondary: float = 0.0,
        read: Read = read_picture,
        secondaries: int = SECONDARIES,
        shuffled: int = SHUFFLED,
    ):
        self.urls, self.manifest, self.seed, self.epoch = urls, manifest, seed, epoch
        self.p_secondary, self.read, self.secondaries, self.shuffled = p_secondary, read, secondaries, shuffled
        self.numbers = {name: i for i, name in enumerate(manifest.counts)}
        self.least = min(manifest.counts.values())

    def __iter__(self) -> Iterator[Sample | Failure]:
        try:
            yield from self._samples()
        except KVAEError as error:
            yield Failure(str(error))

    def _samples(self) -> Iterator[Sample]:
        rank, _, worker, _ = pytorch_worker_info()
        draws = Draws(self.seed, "stream", self.epoch, rank, worker)
        skipped: list[str] = []
        shards = Draws(self.seed, "shards", self.epoch).bits()  # one order for all workers, who share it out
        pipeline = wds.DataPipeline(
            wds.ResampledShards(self.urls, seed=0, worker_seed=lambda: shards, deterministic=True),
            wds.split_by_node,
            wds.split_by_worker,
            lambda source: self._entries(source, skipped),
            lambda source: self._accepted(source, draws),
            wds.shuffle(self.shuffled, rng=random.Random(draws.bits())),
        )
        unreadable = 0
        for chosen in pipeline:
            if (sample := self._sample(chosen, skipped)) is not None:
                unreadable = 0
                yield replace(sample, skipped=tuple(skipped))
                skipped.clear()
            elif (unreadable := unreadable + 1) == MOST_UNREADABLE:
                raise UserError(f"{unreadable} pictures in a row cannot be read; the last: {skipped[-1]}")

    def _entries(self, source: Iterable[dict[str, Any]], skipped: list[str]) -> Iterator[tuple[str, Entry]]:
        """Yield the address and the samples of each shard. A shard that fails is left out from there on."""
        empty = 0
        for url in (shard["url"] for shard in source):
            found, why = False, "it holds no picture"
            try:
                with gopen(url) as file:
                    for entry in samples(file, with_pictures=True):
                        found = True
                        yield url, entry
            except (OSError, ValueError, tarfile.TarError) as error:
                why = _why(error)
                skipped.append(f"{url}: {why}")
            empty = 0 if found else empty + 1
            if empty == MOST_EMPTY:
                raise UserError(f"{empty} shards in a row gave no picture; the last: {url}: {why}")

    def _accepted(self, source: Iterable[tuple[str, Entry]], draws: Draws) -> Iterator[_Chosen]:
        """Yield the pictures that are accepted, each with its secondary."""
        latest: OrderedDict[int, tuple[str, bytes]] = OrderedDict()
        for url, entry in source:
            try:
                identity = identity_of(entry.about, self.manifest.key)
                number, count = self.numbers[identity], self.manifest.counts[identity]
            except ValueError as error:
                raise UserError(f"{url}: {entry.id}.json: {error}") from None
            except KeyError:
                raise UserError(
                    f"{url}: {entry.id} is of {identity!r}, which the manifest lacks; take theirs"
                ) from None
            accepted, wanted = draws.unit() * count < self.least, draws.unit() < self.p_secondary
            if accepted:
                held, data = latest.pop(number, ("", b""))
                yield _Chosen(entry.id, number, entry.data, data if wanted and held not in ("", entry.id) else None)
                latest[number] = entry.id, entry.data
                if len(latest) > self.secondaries:
                    latest.popitem(last=False)

    def _sample(self, chosen: _Chosen, skipped: list[str]) -> Sample | None:
        try:
            picture = self.read(chosen.picture)
        except PictureError as error:
            skipped.append(f"{chosen.id}: {error}")
            return None
        secondary = None
        if chosen.secondary is not None:
            with suppress(PictureError):  # it was named when it was the picture itself
                secondary = self.read(chosen.secondary)
        return Sample(chosen.id, chosen.identity, picture, secondary)


@dataclass(frozen=True)
class _Chosen:
    id: str
    identity: int
    picture: bytes
    secondary: bytes | None


def streamed(stream: Stream, workers: int) -> Iterator[Sample]:
    """Run a stream in worker processes, or in this one if `workers` is 0, and yield what they give, turn by turn.

    Raises:
        UserError: several shards in a row, or many pictures, could not be read, or a picture's identity is unknown.
    """
    for item in DataLoader(stream, batch_size=None, num_workers=workers):
        if isinstance(item, Failure):
            raise UserError(item.message)
        yield item


def _why(error: Exception) -> str:
    """Why a shard could not be read. The message of a failed transfer would show its command, and a token in it."""
    if isinstance(error, OSError):
        return error.strerror or "the transfer failed"
    return f"damaged, cut short, or not a tar ({error})" if isinstance(error, tarfile.TarError) else str(error)
