"""Many latent pairs in few files, mapped into memory: any crop of any clip is read without the rest.

    python -m training pack --latent-root latents --output-root shards
    python -m training unpack --latent-root shards --output-root latents

A shard, `00000.safetensors`, holds clips of one shape: `z_h` and `z_k`, float16 [N, c, t, h, w]; mean and standard
deviation of each clip's channels, float32 [N, c] (`mean_h`, `std_h`, `mean_k`, `std_k`); and `clips`, the bytes of a
JSON list of names and sources. `index.json` lists the shards and the statistics of all channels. Pack again after
another extraction: what is packed already stays as it is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..kvae import WeightsError
from ..kvae.files import Weights, save_weights
from ..kvae.paths import write_text
from .crops import Slices
from .errors import UserError
from .options import option
from .pairs import (
    SUFFIX,
    Pair,
    Shape,
    Source,
    clip_name,
    find_manifests,
    find_pairs,
    pair_shape,
    read_manifest,
    read_pair,
    write_pair,
)

FORMAT = "kvae-latent-shards/1"
INDEX = "index.json"
SHARD_BYTES = 256 * 2**20  # held in memory while packing
OPEN_SHARDS = 256  # mapped at once; each is one file handle, and no memory of its own


@dataclass
class PackConfig:
    latent_root: str = option(..., "folder of pairs, from extract")
    output_root: str = option(..., "folder for the shards")


@dataclass
class UnpackConfig:
    latent_root: str = option(..., "folder of shards, from pack")
    output_root: str = option(..., "folder for the pairs")


def run_pack(config: PackConfig) -> int:
    """Pack; returns 0."""
    root, out = Path(config.latent_root), Path(config.output_root)
    paths = find_pairs(root)
    _copy_manifests(root, out)
    shards = [_describe(path) for path in sorted(out.glob("*.safetensors"))]
    packed = {entry["clip"] for shard in shards for entry in _clips(Weights(out / shard["file"])["clips"])}
    todo = [path for path in paths if clip_name(path, root) not in packed]
    for clips, pairs in _grouped(todo, root):
        path = out / f"{len(shards):05d}.safetensors"
        write_shard(path, clips, pairs)
        shards.append(_describe(path))
    index = {
        "format": FORMAT,
        "pairs": sum(shard["pairs"] for shard in shards),
        "statistics": _statistics([out / shard["file"] for shard in shards]),
        "shards": shards,
    }
    write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    print(f"{len(todo)} pairs packed, {len(packed)} already there → {len(shards)} shards in {out}")
    return 0


def run_unpack(config: UnpackConfig) -> int:
    """Unpack; returns 0."""
    root, out = Path(config.latent_root), Path(config.output_root)
    shards = Shards(root)
    _copy_manifests(root, out)
    made = 0
    for i, name in enumerate(tqdm(shards.names(), desc="unpack", total=len(shards), unit="clip", disable=None)):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{root}: a clip is called {name!r}, which lies outside of --output-root; nothing to trust")
        path = out / (name + SUFFIX)
        if not path.exists():
            write_pair(path, shards.read(i))
            made += 1
    print(f"{made} pairs unpacked, {len(shards) - made} already there → {out}")
    return 0


def _copy_manifests(root: Path, out: Path) -> None:
    """The manifest goes with the pairs; a folder keeps to one, or to one for each folder in it."""
    ours, theirs = read_manifest(root), read_manifest(out)
    if out.is_dir() and any(out.iterdir()) and ours != theirs:
        raise UserError(f"{out}: holds pairs made otherwise ({theirs or 'it does not say how'}); choose another folder")
    for path in find_manifests(root):
        write_text(out / path.relative_to(root), path.read_text(encoding="utf-8"))


def _grouped(paths: list[Path], root: Path) -> Iterator[tuple[list[dict], list[Pair]]]:
    """Pairs of one shape at a time, as many as fit."""
    groups: dict[tuple, tuple[list[dict], list[Pair]]] = defaultdict(lambda: ([], []))
    held = 0
    for path in tqdm(paths, desc="pack", unit="clip", disable=None):
        pair = read_pair(path)
        clips, pairs = groups[pair.z_h.shape, pair.z_k.shape]
        clips.append({"clip": clip_name(path, root), "source": asdict(pair.source) if pair.source else None})
        pairs.append(pair)
        held += _bytes(pair)
        if held >= SHARD_BYTES:
            largest = max(groups, key=lambda key: len(groups[key][1]) * _bytes(groups[key][1][0]))
            clips, pairs = groups.pop(largest)
            held -= len(pairs) * _bytes(pairs[0])
            yield clips, pairs
    yield from groups.values()


def _bytes(pair: Pair) -> int:
    return pair.z_h.nbytes + pair.z_k.nbytes


def write_shard(path: Path, clips: list[dict], pairs: list[Pair]) -> None:
    """Write a shard of pairs of one shape, whole or not at all."""
    tensors = {"clips": torch.frombuffer(bytearray(json.dumps(clips).encode()), dtype=torch.uint8)}
    for name, latents in (("h", [pair.z_h for pair in pairs]), ("k", [pair.z_k for pair in pairs])):
        z_Ncthw = torch.stack(latents)
        flat = z_Ncthw.flatten(2)
        tensors[f"z_{name}"] = z_Ncthw
        tensors[f"mean_{name}"] = torch.stack([z.double().mean(1) for z in flat]).float()
        tensors[f"std_{name}"] = torch.stack([z.double().std(1, correction=0) for z in flat]).float()
    save_weights(path, tensors, {"format": FORMAT})


def _describe(path: Path) -> dict:
    """A line of the index, off the shard's own header."""
    try:
        weights = Weights(path)
    except WeightsError as error:
        raise UserError(str(error)) from None
    if weights.metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a shard of latent pairs; choose another --output-root")
    n, *z_h = weights.shapes["z_h"]
    return {"file": path.name, "pairs": n, "z_h": z_h, "z_k": list(weights.shapes["z_k"][1:])}


def _clips(tensor: Tensor) -> list[dict]:
    """Names and sources, off a shard's `clips`."""
    return json.loads(tensor.numpy().tobytes())


def _statistics(paths: list[Path]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of every channel over all positions of all clips."""
    out = {}
    for name in ("h", "k"):
        count, first, second = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for path in paths:
            shard = Weights(path)
            mean, std = shard[f"mean_{name}"].double(), shard[f"std_{name}"].double()
            positions = int(np.prod(shard.shapes[f"z_{name}"][2:]))
            count += positions * len(mean)
            first = first + positions * mean.sum(0)
            second = second + positions * (std.square() + mean.square()).sum(0)
        mean = first / count
        out[f"z_{name}"] = {"mean": mean.tolist(), "std": (second / count - mean.square()).clamp(min=0).sqrt().tolist()}
    return out


class Shards:
    """Pairs of a folder of shards by number. No latents are held; what is read is copied out of the mapping.

    Raises:
        UserError: the index is not one.
    """

    def __init__(self, root: Path):
        self.root = root
        try:
            index = json.loads((root / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']}, not {FORMAT}")
            self.files = [str(shard["file"]) for shard in index["shards"]]
            self.shard_shapes = [
                pair_shape(root / shard["file"], {"z_h": shard["z_h"], "z_k": shard["z_k"]})
                for shard in index["shards"]
            ]
            self.ends = np.array(list(accumulate(int(shard["pairs"]) for shard in index["shards"])))
        except FileNotFoundError:
            raise UserError(f"{root}: no {INDEX} in it; run `python -m training pack` first, or to its end") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root / INDEX}: not the index of packed pairs ({error}); pack them again") from None
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._clips = lru_cache(1)(self._read_clips)  # pairs are read shard after shard, but for crops, which need none

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def names(self) -> Iterator[str]:
        """The clips' names in order; those of one shard are in memory, and of the next while it is read."""
        for number in range(len(self.files)):
            yield from (entry["clip"] for entry in self._clips(number))

    def name(self, i: int) -> str:
        """The clip's path in the folder it was packed from, without suffix."""
        number, row = self._place(i)
        return self._clips(number)[row]["clip"]

    @cached_property
    def shapes(self) -> tuple[list[Shape], np.ndarray]:
        """The shapes there are, and which of them each pair has, int32 [pairs]."""
        numbers: dict[Shape, int] = {}
        kinds = [numbers.setdefault(shape, len(numbers)) for shape in self.shard_shapes]
        return list(numbers), np.repeat(np.array(kinds, np.int32), np.diff(self.ends, prepend=0))

    def read(self, i: int) -> Pair:
        """A whole pair."""
        number, row = self._place(i)
        z_h, z_k = (self._slice(number, name)[row] for name in ("z_h", "z_k"))
        source = self._clips(number)[row]["source"]
        return Pair(z_h, z_k, Source(**source) if source else None)

    def crop(self, i: int, where: Slices) -> tuple[Tensor, Tensor]:
        """Part of a pair: float16 [c, t, h, w] and [c', t, h, w]."""
        number, row = self._place(i)
        part = (slice(row, row + 1), slice(None), *where)
        z_h, z_k = (self._slice(number, name)[part][0] for name in ("z_h", "z_k"))
        return z_h, z_k

    def _place(self, i: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, int(i - (self.ends[number - 1] if number else 0))

    def _slice(self, number: int, name: str):
        return self._open(number).get_slice(name)

    def _read_clips(self, number: int) -> list[dict]:
        return _clips(self._open(number).get_tensor("clips"))

    def _open_shard(self, number: int):
        path = self.root / self.files[number]
        try:
            shard = safe_open(path, framework="pt")
            found = {name: shard.get_slice(name).get_shape() for name in ("z_h", "z_k")}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: missing or damaged ({error}); delete it and pack again") from None
        pairs = int(self.ends[number] - (self.ends[number - 1] if number else 0))
        expected = self.shard_shapes[number]
        h, k = [expected.channels_h, *expected[2:]], [expected.channels_k, *expected[2:]]
        if found != {"z_h": [pairs, *h], "z_k": [pairs, *k]}:
            raise UserError(f"{path}: its latents are {found}, not as {INDEX} says; pack again into an empty folder")
        return shard
