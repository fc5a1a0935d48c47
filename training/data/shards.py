"""Many latent pairs in few files, mapped into memory, so that a crop of a clip is read without the rest.

A shard, `00000.safetensors`, holds clips of one shape: `z_h` and `z_k`, float16 [N, c, t, h, w]; mean and standard
deviation of each clip's channels, float32 [N, c] (`mean_h`, `std_h`, `mean_k`, `std_k`); and `clips`, the bytes of a
JSON list of names and sources. `index.json` lists the shards and the statistics of all channels. `packing` writes
both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kvae import WeightsError
from ...kvae.files import Weights, save_weights
from ...kvae.finite import all_finite
from ...kvae.foreign import parse_json, parse_object
from ...kvae.paths import check_regular, read_text
from ..errors import UserError
from .crops import Slices, finer, whole_clip
from .pairs import Pair, Shape, Source, lies_inside, pair_shape, source_of, tensor_shape

FORMAT = "kvae-latent-shards/1"
INDEX = "index.json"
OPEN_SHARDS = 256  # mapped at once; each costs a file handle and no memory
ADVICE = "delete it and pack again"


def write_shard(path: Path, clips: list[dict], pairs: list[Pair]) -> None:
    """Write a shard of pairs of one shape, completely or not at all.

    Args:
        clips: for each pair, its name ("clip") and its source ("source"), which may be None.

    Raises:
        WeightsError: the file cannot be written.
    """
    tensors = {"clips": torch.frombuffer(bytearray(json.dumps(clips).encode()), dtype=torch.uint8)}
    for name, latents in (("h", [pair.z_h for pair in pairs]), ("k", [pair.z_k for pair in pairs])):
        z_Ncthw = torch.stack(latents)
        flat = z_Ncthw.flatten(2)
        tensors[f"z_{name}"] = z_Ncthw
        tensors[f"mean_{name}"] = torch.stack([z.double().mean(1) for z in flat]).float()
        tensors[f"std_{name}"] = torch.stack([z.double().std(1, correction=0) for z in flat]).float()
    save_weights(path, tensors, {"format": FORMAT})


def shard_files(folder: Path) -> list[Path]:
    """The files in a folder with names of shards, sorted."""
    return sorted(folder.glob("*.safetensors"))


def describe(path: Path) -> dict[str, Any]:
    """The entry of a shard in the index, from the shard's own header.

    Raises:
        UserError: the shard is damaged, or is not a shard.
    """
    try:
        weights = Weights(path)
    except WeightsError as error:
        raise UserError(f"{path}: damaged, or not a shard ({error}); {ADVICE}") from None
    if weights.metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a shard of latent pairs; choose another --output-root")
    z_h, z_k = (list(weights.shapes.get(name, ())) for name in ("z_h", "z_k"))
    pair_shape(path, {"z_h": z_h[1:], "z_k": z_k[1:]})
    of_clips = {"mean_h": z_h[:2], "std_h": z_h[:2], "mean_k": z_k[:2], "std_k": z_k[:2]}
    wrong = [name for name, shape in of_clips.items() if list(weights.shapes.get(name, ())) != shape]
    if wrong or "clips" not in weights.shapes:
        raise UserError(
            f"{path}: {', '.join(wrong) or 'clips'}: missing, or not as in a shard of {z_h[0]} pairs; {ADVICE}"
        )
    return {"file": path.name, "pairs": z_h[0], "z_h": z_h[1:], "z_k": z_k[1:]}


def packed_clips(folder: Path, shards: list[dict[str, Any]]) -> set[str]:
    """The names of the clips in these shards.

    Raises:
        UserError: a shard does not list its clips, or a clip is in two shards.
    """
    held: dict[str, str] = {}
    for shard in shards:
        path = folder / shard["file"]
        for clip in _clips(path, Weights(path)["clips"], shard["pairs"]):
            if (name := clip["clip"]) in held:
                raise UserError(f"{path}: holds {name!r}, as does {held[name]}; delete one of them and pack again")
            held[name] = shard["file"]
    return set(held)


def _clips(path: Path, tensor: Tensor, pairs: int) -> list[dict[str, Any]]:
    """Names and sources of a shard's clips, from its tensor `clips`.

    Raises:
        UserError: the list is malformed, or has another number of clips.
    """
    try:
        clips = parse_json(tensor.numpy().tobytes())
        if not isinstance(clips, list) or not all(isinstance(c, dict) and type(c.get("clip")) is str for c in clips):
            raise ValueError("not a list of clips with names")
        if len(clips) != pairs:
            raise ValueError(f"{len(clips)} names for {pairs} clips")
        return clips
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: does not say which clips it holds ({error}); {ADVICE}") from None


def statistics(paths: list[Path]) -> dict[str, dict[str, list[float]]]:
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
    """Pairs of a folder of shards, by number. Latents are copied out of the mapped files when they are read.

    Raises:
        UserError: the index is malformed, or does not fit the shards in the folder.
    """

    def __init__(self, root: Path):
        self.root = root
        if not (root / INDEX).exists():
            raise UserError(f"{root}: no {INDEX} in it; run `python -m training pack`, to its end")
        try:
            index = parse_object(read_text(root / INDEX))
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']}, not {FORMAT}")
            entries = [_Entry(root, entry) for entry in index["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root / INDEX}: not the index of packed pairs ({error}); pack them again") from None
        self.files = [entry.file for entry in entries]
        self.shard_shapes = [entry.shape for entry in entries]
        self.ends = np.array(list(accumulate(entry.pairs for entry in entries)), dtype=np.int64)
        self._check_files()
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._clips = lru_cache(1)(self._read_clips)  # whole pairs are read shard after shard; crops need no clips

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def names(self) -> Iterator[str]:
        """Names of the clips, in order. Only the names of one shard are in memory."""
        return (entry["clip"] for number in range(len(self.files)) for entry in self._clips(number))

    def videos(self) -> Iterator[str | None]:
        """Videos of the pairs, in order; None for pairs that do not say."""
        entries = (entry for number in range(len(self.files)) for entry in self._clips(number))
        return (source.video if (source := source_of(entry.get("source"))) else None for entry in entries)

    def check_names(self) -> None:
        """Refuse names of clips that cannot become files in a folder.

        Raises:
            UserError: two clips have the same name, or a name leads out of the folder.
        """
        seen: set[PurePath] = set()
        for name in self.names():
            if not lies_inside(name):
                raise UserError(
                    f"{self.root}: a clip is called {name!r}, which points outside --output-root; "
                    "the shard is corrupt or malicious"
                )
            if PurePath(name) in seen:
                raise UserError(f"{self.root}: two clips are called {name!r}; one would overwrite the other")
            seen.add(PurePath(name))

    def name(self, i: int) -> str:
        """The clip's path in the folder it was packed from, without suffix."""
        number, row = self._place(i)
        return self._clips(number)[row]["clip"]

    def source(self, i: int) -> Source | None:
        """The frames that pair i was made of; None if the pair does not say."""
        number, row = self._place(i)
        return source_of(self._clips(number)[row].get("source"))

    def shape(self, i: int) -> Shape:
        """The shape of pair i."""
        return self.shard_shapes[self._place(i)[0]]

    @cached_property
    def shapes(self) -> tuple[list[Shape], np.ndarray]:
        """The distinct shapes, and the number of each pair's shape, int32 [pairs]."""
        numbers: dict[Shape, int] = {}
        kinds = [numbers.setdefault(shape, len(numbers)) for shape in self.shard_shapes]
        return list(numbers), np.repeat(np.array(kinds, np.int32), np.diff(self.ends, prepend=0))

    def read(self, i: int) -> Pair:
        """The whole pair i. Errors are those of `crop`."""
        shape = self.shape(i)
        z_h, z_k = self.crop(i, *(finer(whole_clip(shape.grid).read, ratio) for ratio in shape.ratios))
        return Pair(z_h, z_k, self.source(i))

    def crop(self, i: int, of_h: Slices, of_k: Slices) -> tuple[Tensor, Tensor]:
        """A part of each latent of pair i: float16 [c, t, h, w] and [c', t, h', w'].

        Raises:
            UserError: a value is not a finite number, or the shard is damaged.
        """
        number, row = self._place(i)
        shard, whole = self._open(number), (slice(row, row + 1), slice(None))
        z_h, z_k = (shard.get_slice(name)[(*whole, *part)][0] for name, part in (("z_h", of_h), ("z_k", of_k)))
        if not (all_finite(z_h) and all_finite(z_k)):
            raise UserError(f"{self.root / self.files[number]}: holds values that are not finite numbers; {ADVICE}")
        return z_h, z_k

    def _place(self, i: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, int(i - (self.ends[number - 1] if number else 0))

    def _pairs(self, number: int) -> int:
        return int(self.ends[number] - (self.ends[number - 1] if number else 0))

    def _read_clips(self, number: int) -> list[dict[str, Any]]:
        path = self.root / self.files[number]
        try:
            clips = self._open(number).get_tensor("clips")
        except SafetensorError as error:
            raise UserError(f"{path}: does not say which clips it holds ({error}); {ADVICE}") from None
        return _clips(path, clips, self._pairs(number))

    def _check_files(self) -> None:
        """Raise UserError unless the index lists the shards in the folder.

        The index is written last, so a run of `pack` that was killed leaves more shards than it lists.
        """
        listed, there = set(self.files), {path.name for path in shard_files(self.root)}
        if len(self.files) != len(listed):
            twice = next(name for name in self.files if self.files.count(name) > 1)
            raise UserError(f"{self.root / INDEX}: lists {twice} twice; pack again")
        for names, what in ((listed - there, "is missing"), (there - listed, f"is not in {INDEX}")):
            if names:
                raise UserError(f"{self.root / min(names)}: {what}; pack again")

    def _open_shard(self, number: int) -> Any:
        path = self.root / self.files[number]
        try:
            check_regular(path)
            shard: Any = safe_open(path, framework="pt")
            parts = {name: shard.get_slice(name) for name in ("z_h", "z_k")}
        except (SafetensorError, OSError, WeightsError) as error:
            raise UserError(f"{path}: missing or damaged ({error}); {ADVICE}") from None
        found = {name: part.get_shape() for name, part in parts.items()}
        kinds = {part.get_dtype() for part in parts.values()}
        counts, inner = {each[0] for each in found.values()}, {name: each[1:] for name, each in found.items()}
        if counts != {self._pairs(number)} or pair_shape(path, inner) != self.shard_shapes[number] or kinds != {"F16"}:
            raise UserError(
                f"{path}: its latents are {found}, {', '.join(sorted(kinds))}, not as {INDEX} says; "
                "pack again into an empty folder"
            )
        return shard


class _Entry:
    """The entry of a shard in the index.

    Raises:
        ValueError: the entry is malformed.
    """

    def __init__(self, root: Path, entry: dict[str, Any]):
        self.file, self.pairs = entry["file"], entry["pairs"]
        if type(self.file) is not str or not lies_inside(self.file) or len(PurePath(self.file).parts) > 1:
            raise ValueError(f"a shard is called {self.file!r}")
        if type(self.pairs) is not int or not 0 < self.pairs < 2**31:
            raise ValueError(f"{self.file} holds {self.pairs} pairs")
        try:
            shapes = {name: tensor_shape({"shape": entry[name]}) for name in ("z_h", "z_k")}
            self.shape = pair_shape(root / self.file, shapes)
        except UserError as error:
            raise ValueError(str(error)) from None
