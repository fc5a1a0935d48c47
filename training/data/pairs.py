"""Latent pairs: one `.safetensors.zst` file per clip, with raw latents `z_h` and `z_k`, float16 [c, t, h, w].

This is the published format, read and written. Ours adds metadata (which frames of which video), which readers of the
published format skip.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...kvae.finite import all_finite
from ...kvae.foreign import build, parse_object
from ...kvae.paths import check_regular, file_errors, read_bytes, write_bytes
from ..errors import UserError
from .walk import files_under

SUFFIX = ".safetensors.zst"
MAX_BYTES = 2**30  # a pair of minutes of 1080p is far smaller
MAX_HEADER = 2**20  # bytes of the safetensors header; a pair's has a few hundred
MAX_SIDE = 2**14  # pixels
MAX_FRAMES = 2**31
ADVICE = "delete it and extract again"


@dataclass(frozen=True)
class Source:
    """The frames that a pair was made of. `first` is None for frames spread evenly over the whole video.

    Raises:
        ValueError: a number is out of its range, or the video is not in the videos root.
    """

    video: str  # relative to the videos root
    first: int | None
    frames: int  # before padding
    padded: int  # repeats of the last frame up to 4n + 1
    height: int
    width: int
    mirrored: bool = False  # left to right
    fit: str = "stretch"  # how frames were resized, see serving/fit.py

    def __post_init__(self) -> None:
        if not lies_inside(self.video):
            raise ValueError(f"video {self.video!r} is not in the videos root")
        bounds = {
            "first": (0, MAX_FRAMES), "frames": (1, MAX_FRAMES), "padded": (0, 3),
            "height": (1, MAX_SIDE), "width": (1, MAX_SIDE),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}; expected {least} to {most}")


class Shape(NamedTuple):
    """The shape of a pair: channels of z_h and of z_k, and the grid of both; the coarser, if they have two."""

    channels_h: int
    channels_k: int
    t: int
    h: int
    w: int
    ratios: tuple[int, int] = (1, 1)  # rows, and columns, of z_h and of z_k for one of the grid

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.t, self.h, self.w

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of z_h and of z_k on the grid, see `adapters.shuffle`."""
        of_h, of_k = self.ratios
        return self.channels_h * of_h**2, self.channels_k * of_k**2

    def __repr__(self) -> str:
        """The text in fingerprints of pairs. For one grid it is that of versions which knew only one."""
        fields = self._asdict()
        if self.ratios == (1, 1):
            del fields["ratios"]
        return f"Shape({', '.join(f'{key}={value}' for key, value in fields.items())})"


@dataclass(frozen=True)
class Pair:
    """z_h, z_k: float16 [c, t, h, w], raw. `source` is None in published files."""

    z_h: Tensor
    z_k: Tensor
    source: Source | None


def lies_inside(name: str, kind: type[PurePath] = PurePath) -> bool:
    """Whether a relative path stays in its folder. The path may come from a file that others wrote.

    Args:
        kind: the path rules, those of this system by default.
    """
    path = kind(name)
    return bool(path.parts) and not (path.anchor or path.drive or ".." in path.parts)


def write_pair(path: Path, pair: Pair) -> None:
    """Write a pair, completely or not at all.

    Raises:
        UserError: a value is not finite, or is too large for float16.
        WeightsError: the file cannot be written.
    """
    tensors = {"z_h": pair.z_h.half().contiguous().cpu(), "z_k": pair.z_k.half().contiguous().cpu()}
    for name, z in tensors.items():
        if not all_finite(z):
            raise UserError(f"{path}: {name} holds values that are not finite numbers in float16; not written")
    metadata = {"source": json.dumps(asdict(pair.source))} if pair.source else None
    write_bytes(path, zstandard.ZstdCompressor(level=6, write_checksum=True).compress(save(tensors, metadata)))


def read_pair(path: Path) -> Pair:
    """Read a pair. A malformed source is left out.

    Raises:
        UserError: not zstd, cut short, a tensor is missing, has a wrong shape or type, or holds values that are not
            finite in float16.
        WeightsError: the file is missing or cannot be read.
    """
    data = _unpacked(path)
    try:
        tensors = load(data)
        header = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cut short or not zstd around safetensors ({error}); {ADVICE}") from None
    pair_shape(path, {name: list(tensor.shape) for name, tensor in tensors.items()})
    z_h, z_k = tensors["z_h"], tensors["z_k"]
    if not (z_h.is_floating_point() and z_k.is_floating_point()):
        raise UserError(f"{path}: z_h is {z_h.dtype}, z_k is {z_k.dtype}; expected float16; {ADVICE}")
    z_h, z_k = z_h.half(), z_k.half()
    if not (all_finite(z_h) and all_finite(z_k)):
        raise UserError(f"{path}: holds values that are not finite numbers in float16; {ADVICE}")
    return Pair(z_h, z_k, _source(header))


def read_header(path: Path) -> tuple[Shape, Source | None]:
    """The shape and the source of a pair, from the first bytes of its file.

    Raises:
        UserError: not zstd, no safetensors inside, or not a pair.
        WeightsError: the file is missing or cannot be read.
    """
    check_regular(path)
    try:
        with file_errors(path), path.open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            size = int.from_bytes(reader.read(8), "little")
            header = parse_object(reader.read(min(size, MAX_HEADER)))
        shapes = {name: tensor_shape(entry) for name, entry in header.items() if name != "__metadata__"}
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: cut short or not zstd ({error}); {ADVICE}") from None
    except ValueError as error:  # an unclosed frame reads as nothing
        raise UserError(f"{path}: cut short or not zstd around safetensors ({error}); {ADVICE}") from None
    return pair_shape(path, shapes), _source(header)


def pair_shape(path: Path, shapes: dict[str, list[int]]) -> Shape:
    """The shape of a pair whose tensors have these shapes.

    Raises:
        UserError: a tensor is missing, or the grid of one does not divide that of the other in space.
    """
    missing = [name for name in ("z_h", "z_k") if name not in shapes]
    if missing:
        found = ", ".join(shapes)[:200] or "nothing"
        raise UserError(f"{path}: has no {missing[0]}; expected z_h and z_k, found {found}")
    z_h, z_k = shapes["z_h"], shapes["z_k"]
    if len(z_h) == len(z_k) == 4 and z_h[1] == z_k[1] and 0 not in z_h + z_k:
        h, w = min(z_h[2:], z_k[2:])
        of_h, of_k = (z[2] // h for z in (z_h, z_k))
        if z_h[2:] == [of_h * h, of_h * w] and z_k[2:] == [of_k * h, of_k * w]:
            return Shape(z_h[0], z_k[0], z_h[1], h, w, (of_h, of_k))
    raise UserError(
        f"{path}: z_h is {z_h}, z_k is {z_k}; expected two [c, t, h, w] of one grid, or one finer by a whole factor"
    )


def _unpacked(path: Path) -> bytes:
    """The unpacked content of a file, from all its zstd frames.

    Raises:
        UserError: the file is not zstd, or unpacks to more than MAX_BYTES.
    """
    data = read_bytes(path, MAX_BYTES)
    parts, size = [], 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            while part := reader.read(2**20):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB; it is not a latent pair")
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: cut short or not zstd ({error}); {ADVICE}") from None
    return b"".join(parts)


def tensor_shape(entry: Any) -> list[int]:
    """The shape of a tensor in a safetensors header.

    Raises:
        ValueError: the entry has no valid shape.
    """
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError("a tensor without a shape")
    return shape


def source_of(values: Any) -> Source | None:
    """The source in a pair's metadata, or None if it is malformed."""
    try:
        return build(Source, values)
    except ValueError:
        return None


def _source(header: dict[str, Any]) -> Source | None:
    try:
        return source_of(parse_object(header["__metadata__"]["source"]))
    except (KeyError, TypeError, ValueError):
        return None


def find_pairs(root: str | Path) -> list[Path]:
    """All pair files under a folder, sorted; links are followed.

    Raises:
        UserError: the folder is missing or holds no pair files.
        WeightsError: a folder in it cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; run `python -m training extract` first")
    paths = sorted(pairs_under(root))
    if not paths:
        raise UserError(f"{root}: no {SUFFIX} files in it; run `python -m training extract` first")
    return paths


def holds_pairs(root: str | Path) -> bool:
    """Whether there is a file with the name of a pair file under a folder."""
    return next(pairs_under(root), None) is not None


def pairs_under(root: str | Path) -> Iterator[Path]:
    """All pair files under a folder, in no particular order; none if the folder is missing."""
    return (path for path in files_under(root) if path.name.endswith(SUFFIX)) if Path(root).is_dir() else iter(())


def clip_name(path: Path, root: Path) -> str:
    """The name of a pair file's clip: its path in the folder, without the suffix."""
    return path.relative_to(root).as_posix().removesuffix(SUFFIX)
