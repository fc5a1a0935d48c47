"""Latent pairs: one `.safetensors.zst` file a clip, fp16 `z_h` and `z_k`, raw, [16, t, h, w] each.

The published format, both ways. Ours adds metadata (which frames of which video), which published readers skip over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import UserError

SUFFIX = ".safetensors.zst"
MAX_BYTES = 2**30  # a pair of 1080p minutes is far below; anything above is not a pair
CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Source:
    """Which frames a pair was made of. `first` is None for frames spread evenly over the whole video."""

    video: str  # relative to the videos root
    first: int | None
    frames: int  # before padding
    padded: int  # repeats of the last frame up to 4n + 1
    height: int
    width: int


@dataclass(frozen=True)
class Pair:
    """z_h, z_k: float16 [c, t, h, w], raw. `source` is None in published files."""

    z_h: Tensor
    z_k: Tensor
    source: Source | None


def write_pair(path: Path, pair: Pair) -> None:
    """Write a pair, whole or not at all."""
    tensors = {"z_h": pair.z_h.half().contiguous().cpu(), "z_k": pair.z_k.half().contiguous().cpu()}
    metadata = {"source": json.dumps(asdict(pair.source))} if pair.source else None
    data = zstandard.ZstdCompressor(level=6).compress(save(tensors, metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_pair(path: Path) -> Pair:
    """Read a pair.

    Raises:
        UserError: not zstd, cut short, a tensor missing, or of a wrong shape or type.
    """
    data = path.read_bytes()
    try:
        if zstandard.frame_content_size(data) > MAX_BYTES:
            raise UserError(f"{path}: says it unpacks to more than {MAX_BYTES >> 20} MiB; that is no latent pair")
        data = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES)
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: cut short or not zstd ({error}); extract it again") from None
    try:
        tensors = load(data)
        metadata = _metadata(data)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: holds no safetensors ({error}); extract it again") from None
    missing = [name for name in ("z_h", "z_k") if name not in tensors]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}; expected z_h and z_k, found {', '.join(tensors) or 'nothing'}")
    z_h, z_k = tensors["z_h"], tensors["z_k"]
    if z_h.ndim != 4 or z_k.ndim != 4 or z_h.shape[1:] != z_k.shape[1:] or 0 in z_h.shape:
        raise UserError(
            f"{path}: z_h is {list(z_h.shape)}, z_k is {list(z_k.shape)}; expected two [c, t, h, w] of one grid"
        )
    if not (z_h.is_floating_point() and z_k.is_floating_point() and z_h.isfinite().all() and z_k.isfinite().all()):
        raise UserError(f"{path}: holds values that are not finite numbers; extract it again")
    return Pair(z_h.half(), z_k.half(), Source(**json.loads(metadata["source"])) if "source" in metadata else None)


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {})


def find_pairs(root: str | Path) -> list[Path]:
    """All pair files under a folder, sorted.

    Raises:
        UserError: the folder is missing or holds none.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; run `python -m training extract` first")
    paths = sorted(root.rglob("*" + SUFFIX))
    if not paths:
        raise UserError(f"{root}: no {SUFFIX} files in it; run `python -m training extract` first")
    return paths


def read_manifest(root: str | Path) -> dict:
    """How the pairs of a folder were made: settings, and the VAEs by hash. Empty for folders that do not say."""
    try:
        manifest = json.loads((Path(root) / "manifest.json").read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("settings", "hunyuan_vae", "kvae")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{root}/manifest.json: not the manifest of an extraction; delete it, or extract again"
        ) from None


class Pairs:
    """Pair files by number, kept in memory up to 4 GiB and read again beyond that."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._cache: dict[int, Pair] = {}
        self._free = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Pair:
        if i in self._cache:
            return self._cache[i]
        pair = read_pair(self.paths[i])
        size = 2 * (pair.z_h.numel() + pair.z_k.numel())
        if size <= self._free:
            self._cache[i] = pair
            self._free -= size
        return pair

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def batch(self, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """z_h and z_k of these pairs, float32 [B, c, t, h, w], on the device. All of one shape."""
        pairs = [self[i] for i in indices]
        z_h, z_k = torch.stack([p.z_h for p in pairs]), torch.stack([p.z_k for p in pairs])
        return z_h.to(device).float(), z_k.to(device).float()
