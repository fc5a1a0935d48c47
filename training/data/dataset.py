"""Latent pairs by number, from a folder of pair files or of shards, as whole clips or as crops.

    pairs = open_pairs("latents")
    for numbers in batches(pairs.groups(radius=3), size=8, seed=0, epoch=0):
        z_h, z_k, weight = pairs.crops(numbers, 3, seed=0, epoch=0, device=device)

Memory grows by about 20 bytes per pair, for their numbers and their order.

The identity of a video is its path in the videos root, which pairs from `extract` know; see `video_of`.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...adapters.shuffle import on_one_grid
from ..errors import UserError
from .crops import Slices, crop_shape, crop_weights, finer, random_crop, whole_clip
from .manifests import extractions
from .pairs import Pair, Shape, clip_name, find_pairs, holds_pairs, read_header, read_pair
from .shards import INDEX, Shards

CACHE_BYTES = 4 * 2**30
Shapes = tuple[list[Shape], np.ndarray]  # the distinct shapes, and the number of each pair's shape
Groups = dict[Shape, np.ndarray]


class Store(Protocol):
    """A folder of pairs, in files or shards. Names are paths in the folder, without suffix."""

    root: Path

    def __len__(self) -> int: ...

    def names(self) -> Iterator[str]: ...

    def name(self, i: int) -> str: ...

    @property
    def shapes(self) -> Shapes: ...

    def videos(self) -> Iterator[str | None]: ...

    def read(self, i: int) -> Pair: ...

    def crop(self, i: int, of_h: Slices, of_k: Slices) -> tuple[Tensor, Tensor]: ...


class PairFiles:
    """A folder of pair files. The first 4 GiB of pairs stay in memory; others are read from disk each time."""

    def __init__(self, root: Path):
        self.root, self.paths = root, find_pairs(root)
        self._cache: dict[int, Pair] = {}
        self._free = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> Iterator[str]:
        return (clip_name(path, self.root) for path in self.paths)

    def name(self, i: int) -> str:
        return clip_name(self.paths[i], self.root)

    @property
    def shapes(self) -> Shapes:
        return self._headers[0]

    def videos(self) -> Iterator[str | None]:
        """The videos the pairs were made of; None for pairs that do not say."""
        return iter(self._headers[1])

    @cached_property
    def _headers(self) -> tuple[Shapes, list[str | None]]:
        numbers: dict[Shape, int] = {}
        kinds, videos = np.empty(len(self.paths), np.int32), []
        for i, path in enumerate(self.paths):
            shape, source = read_header(path)
            kinds[i] = numbers.setdefault(shape, len(numbers))
            videos.append(source.video if source else None)
        return (list(numbers), kinds), videos

    def read(self, i: int) -> Pair:
        if i in self._cache:
            return self._cache[i]
        pair = read_pair(self.paths[i])
        size = pair.z_h.nbytes + pair.z_k.nbytes
        if size <= self._free:
            self._cache[i] = pair
            self._free -= size
        return pair

    def crop(self, i: int, of_h: Slices, of_k: Slices) -> tuple[Tensor, Tensor]:
        pair = self.read(i)
        return pair.z_h[(slice(None), *of_h)], pair.z_k[(slice(None), *of_k)]


def open_pairs(root: str | Path) -> Pairs:
    """Open the pairs of a folder, packed or not.

    Raises:
        UserError: the folder is missing, holds no pairs, or holds both pair files and shards.
    """
    root = Path(root)
    if (root / INDEX).exists():
        if holds_pairs(root):
            raise UserError(f"{root}: holds pairs and shards of pairs; keep them in separate folders")
        return Pairs(Shards(root))
    packed = not holds_pairs(root) and any(root.glob("*.safetensors"))
    return Pairs(Shards(root) if packed else PairFiles(root))


class Pairs:
    """Pairs of a store, all or some, by number."""

    def __init__(self, store: Store, numbers: np.ndarray | None = None):
        self.store = store
        self.numbers = np.arange(len(store)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Pair:
        return self.store.read(int(self.numbers[i]))

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def name(self, i: int) -> str:
        """The clip's path in its folder, without suffix."""
        return self.store.name(int(self.numbers[i]))

    def take(self, chosen: np.ndarray | list[int]) -> Pairs:
        """Some of the pairs, by their numbers or by a boolean for each pair."""
        return Pairs(self.store, self.numbers[chosen])

    def spread(self, count: int) -> Pairs:
        """At most `count` of the pairs, evenly spread, so that even a few pairs cover every class."""
        return self if count >= len(self) else self.take(spread(len(self), count))

    def digest(self) -> str:
        """sha256 of the pairs' names, which identifies the clips."""
        return _sha256(name for name, _ in self._chosen(self.store.names()))

    def fingerprint(self) -> str:
        """sha256 of the pairs' names and shapes, which must be the same for a training to go on."""
        kinds, kind = self.store.shapes
        return _sha256(f"{name} {kinds[kind[i]]}" for name, i in self._chosen(self.store.names()))

    def videos(self) -> np.ndarray:
        """The video of each pair, as uint32 [pairs] that are equal for clips of the same video."""
        folders = extractions(self.store.root)
        both = zip(self.store.names(), self.store.videos(), strict=True)
        videos = (video_of(name, video, folders) for name, video in both)
        hashes = (zlib.crc32(_bytes(video)) for video in videos)
        return np.fromiter(hashes, np.uint32, len(self.store))[self.numbers]

    def halves(self) -> np.ndarray:
        """Two halves, as bool [pairs], True for the second. All clips of a video are in the same half.

        Raises:
            UserError: all pairs are of one video.
        """
        _, first, which = np.unique(self.videos(), return_index=True, return_inverse=True)
        if len(first) < 2:
            raise UserError("pairs of one video only, which cannot be split in two")
        in_order = np.argsort(first)
        ends = np.cumsum(np.bincount(which)[in_order])
        of_first = max(1, int(np.argmin(np.abs(ends - len(self) / 2))) + 1)
        return ~np.isin(which, in_order[: min(of_first, len(first) - 1)])

    def _chosen(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """The names of these pairs out of all names, each with its number in the store."""
        chosen = np.zeros(len(self.store), dtype=bool)
        chosen[self.numbers] = True
        return ((name, i) for i, (name, taken) in enumerate(zip(names, chosen, strict=True)) if taken)

    def shape(self, i: int) -> Shape:
        """The shape of pair i."""
        kinds, kind = self.store.shapes
        return kinds[kind[self.numbers[i]]]

    def groups(self, radius: int | None) -> Groups:
        """Numbers of the pairs that can share a batch, by the shape of their crops; radius None means whole clips."""
        kinds, kind = self.store.shapes
        members: dict[Shape, list[np.ndarray]] = defaultdict(list)
        for number, shape in enumerate(kinds):
            grid = shape.grid if radius is None else crop_shape(shape.grid, radius)
            read = Shape(shape.channels_h, shape.channels_k, *grid, shape.ratios)
            members[read].append(np.flatnonzero(kind[self.numbers] == number))
        return {shape: np.sort(np.concatenate(parts)) for shape, parts in members.items() if sum(map(len, parts))}

    def crops(
        self, indices: np.ndarray, radius: int | None, seed: int, epoch: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A random crop of each of these pairs of one group. It depends on the seed, the epoch and the pair only.

        Returns:
            z_h, z_k: float32 [B, c, t, h, w], with halos, on one grid (see `adapters.shuffle`).
            weight: of each position in the loss, float32 [B, 1, t, h, w]; its sum over a crop is 1.
        """
        chosen, latents = [], []
        for i in indices:
            shape = self.shape(i)
            crop = whole_clip(shape.grid) if radius is None else random_crop(shape.grid, radius, _rng(seed, epoch, i))
            latents.append(self.store.crop(int(self.numbers[i]), *(finer(crop.read, ratio) for ratio in shape.ratios)))
            chosen.append(crop)
        z_h, z_k = (torch.stack(parts).to(device).float() for parts in zip(*latents, strict=True))
        return *on_one_grid(z_h, z_k), crop_weights(chosen).to(device)

    def batch(self, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """z_h and z_k of whole pairs of one shape, as float32 [B, c, t, h, w] and [B, c', t, h, w] on the device."""
        pairs = [self[i] for i in indices]
        z_h, z_k = torch.stack([p.z_h for p in pairs]), torch.stack([p.z_k for p in pairs])
        return z_h.to(device).float(), z_k.to(device).float()


def batches(groups: Groups, size: int, seed: int, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
    """Numbers of the pairs in each batch of an epoch, from batch `start` on.

    The order is shuffled. A batch is of one group; the last batch of a group may be smaller.
    """
    rng = _rng(seed, epoch)
    shuffled = [rng.permutation(group) for group in groups.values()]
    ends = np.cumsum([math.ceil(len(group) / size) for group in shuffled])
    for n in rng.permutation(ends[-1])[start:]:
        group = int(np.searchsorted(ends, n, side="right"))
        first = int(n - (ends[group - 1] if group else 0)) * size
        yield shuffled[group][first : first + size]


def spread(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, evenly spread, so that even a few samples cover every class."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def video_of(name: str, video: str | None, extractions: Sequence[str] = ()) -> str:
    """The video of a clip: the path in the pair's source, else the clip's own name without the endings of `extract`.

    Args:
        name: the clip's path in the folder of pairs, without suffix.
        video: in the pair's source, if it has one.
        extractions: folders that hold clips of the same videos, side by side.
    """
    if video:
        return video
    extraction = next((each for each in extractions if name.startswith(f"{each}/")), "")
    return re.sub(r"(\.\d{3})?(\.mirrored)?$", "", name.removeprefix(f"{extraction}/"))


def _sha256(lines: Iterable[str]) -> str:
    sha256 = hashlib.sha256()
    for line in lines:
        sha256.update(_bytes(line) + b"\n")
    return sha256.hexdigest()


def _bytes(name: str) -> bytes:
    """A name as bytes, even if the file system's name is not valid UTF-8."""
    return name.encode(errors="surrogatepass")


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng([int(part) for part in key])
