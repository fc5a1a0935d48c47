"""Pack latent pairs into shards, and unpack them.

    python -m training pack --latent-root latents --output-root shards
    python -m training unpack --latent-root shards --output-root latents

Pack again after another extraction, or after you have deleted a damaged shard. Pairs that are packed already stay as
they are; the others are added in shards with new numbers.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ...kvae.paths import file_errors, read_text, write_text
from ..errors import UserError
from ..options import option
from ..runtime.places import alone_in
from ..runtime.stages import hidden, tell
from .manifests import all_manifests, find_manifests, read_manifest
from .pairs import (
    SUFFIX,
    Pair,
    clip_name,
    find_pairs,
    holds_pairs,
    read_header,
    read_pair,
    write_pair,
)
from .shards import FORMAT, INDEX, Shards, describe, packed_clips, shard_files, statistics, write_shard

SHARD_BYTES = 256 * 2**20  # of pairs, held in memory while packing


@dataclass
class PackConfig:
    latent_root: str = option(..., "folder of pairs, from extract")
    output_root: str = option(..., "folder for the shards", writes="folder")


@dataclass
class UnpackConfig:
    latent_root: str = option(..., "folder of shards, from pack")
    output_root: str = option(..., "folder for the pairs", writes="folder")


def run_pack(config: PackConfig) -> int:
    """Pack the pairs that are not packed yet; return 0.

    Raises:
        UserError: there are no pairs, a pair or a shard is damaged, or the pairs do not fit those packed already.
        WeightsError: a shard or the index cannot be written.
    """
    root, out = Path(config.latent_root), Path(config.output_root)
    _check_apart(root, out)
    paths = find_pairs(root)
    with alone_in(out, "pack"):
        manifests = _manifests(root, out, bool(shard_files(out)) or (out / INDEX).exists())
        shards = [describe(path) for path in shard_files(out)]
        packed = packed_clips(out, shards)
        todo = [path for path in paths if clip_name(path, root) not in packed]
        for clips, pairs in _grouped(todo, root, {(shard["z_h"][0], shard["z_k"][0]) for shard in shards}):
            _copy(manifests, root, out)
            path = out / f"{_next_number(out):05d}.safetensors"
            write_shard(path, clips, pairs)
            shards.append(describe(path))
        _copy(manifests, root, out)
        index = {
            "format": FORMAT,
            "pairs": sum(shard["pairs"] for shard in shards),
            "statistics": statistics([out / shard["file"] for shard in shards]),
            "shards": shards,
        }
        write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    print(f"{len(todo)} pairs packed, {len(packed)} already there → {len(shards)} shards in {out}")
    return 0


def run_unpack(config: UnpackConfig) -> int:
    """Unpack the pairs whose files do not exist yet; return 0.

    Raises:
        UserError: there are no shards, a shard is damaged, or a file of another pair has the name of a pair.
        WeightsError: a pair cannot be written.
    """
    root, out = Path(config.latent_root), Path(config.output_root)
    _check_apart(root, out)
    shards = Shards(root)
    shards.check_names()
    manifests = _manifests(root, out, holds_pairs(out))
    made = 0
    for i, name in enumerate(tqdm(shards.names(), desc="unpack", total=len(shards), unit="clip", disable=hidden())):
        path = out / (name + SUFFIX)
        if not _is_there(path, shards, i):
            pair = shards.read(i)
            _copy(manifests, root, out)
            write_pair(path, pair)
            made += 1
    _copy(manifests, root, out)
    print(f"{made} pairs unpacked, {len(shards) - made} already there → {out}")
    return 0


def _check_apart(root: Path, out: Path) -> None:
    one, other = (Path(os.path.realpath(path)) for path in (root, out))  # Path.resolve fails at links in a circle
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f"{root} and {out}: one lies in the other; pairs and shards need separate folders")


def _manifests(root: Path, out: Path, holds: bool) -> list[Path]:
    """The manifests to copy with the pairs. Those of the pairs that `out` holds already must be the same.

    Args:
        holds: whether `out` holds pairs or shards.

    Raises:
        UserError: pairs in `out` were made with other settings or VAEs.
    """
    read_manifest(root)  # raises if the folders in it are of different VAEs
    ours, theirs = all_manifests(root), all_manifests(out) if holds else {}
    same = all(ours.get(folder) == manifest for folder, manifest in theirs.items())
    if holds and (not same or bool(ours) != bool(theirs)):
        raise UserError(
            f"{out}: holds pairs made in another way ({theirs or 'it does not say how'}); choose another folder"
        )
    return find_manifests(root)


def _copy(manifests: list[Path], root: Path, out: Path) -> None:
    """Copy the manifests once, with the first pair, so that a run without a pair leaves none."""
    while manifests:
        path = manifests.pop()
        write_text(out / path.relative_to(root), read_text(path))


def _next_number(out: Path) -> int:
    """A number above those of all shards; the numbers of deleted shards are not used again."""
    return max((int(path.stem) for path in shard_files(out) if path.stem.isdecimal()), default=-1) + 1


def _is_there(path: Path, shards: Shards, i: int) -> bool:
    """Whether a pair was unpacked already.

    Raises:
        UserError: another pair has its name.
    """
    with file_errors(path):
        if not path.exists():
            return False
    if read_header(path) != (shards.shape(i), shards.source(i)):
        raise UserError(f"{path}: not the pair that the shards hold under this name; choose another --output-root")
    return True


def _grouped(paths: list[Path], root: Path, channels: set[tuple[int, int]]) -> Iterator[tuple[list[dict], list[Pair]]]:
    """Groups of pairs of one shape, of up to SHARD_BYTES each.

    Args:
        channels: of the pairs that are packed already.

    Raises:
        UserError: a pair has other channels.
    """
    groups: dict[tuple, tuple[list[dict], list[Pair]]] = defaultdict(lambda: ([], []))
    held = 0
    for n, path in enumerate(tqdm(paths, desc="pack", unit="clip", disable=hidden())):
        tell(n / len(paths))
        pair = read_pair(path)
        found = len(pair.z_h), len(pair.z_k)
        if found not in (channels or {found}):
            raise UserError(f"{path}: {found[0]} and {found[1]} channels; the pairs before had others")
        channels = {found}
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
