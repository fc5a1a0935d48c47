"""Latent pairs: one `.safetensors.zst` file a clip, fp16 `z_h` and `z_k`, raw, [16, t, h, w] each.

The published format, both ways. Ours adds metadata (which frames of which video), which published readers skip over.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..adapters.files import VAEWeights
from ..adapters.spaces import LatentSpace, space
from ..kvae.foreign import build
from ..kvae.paths import write_bytes
from ..kvae.signature import same_weights
from .errors import UserError

SUFFIX = ".safetensors.zst"
MANIFEST = "manifest.json"
VAES = ("hunyuan_vae", "kvae")  # in a manifest
MAX_BYTES = 2**30  # a pair of 1080p minutes is far below; anything above is not a pair
MAX_HEADER = 2**20  # of safetensors; that of a pair is a few hundred bytes


@dataclass(frozen=True)
class Source:
    """Which frames a pair was made of. `first` is None for frames spread evenly over the whole video."""

    video: str  # relative to the videos root
    first: int | None
    frames: int  # before padding
    padded: int  # repeats of the last frame up to 4n + 1
    height: int
    width: int
    mirrored: bool = False  # left to right


class Shape(NamedTuple):
    """Of a pair: channels of z_h and of z_k, and the grid that both have."""

    channels_h: int
    channels_k: int
    t: int
    h: int
    w: int


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
    write_bytes(path, zstandard.ZstdCompressor(level=6).compress(save(tensors, metadata)))


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
    pair_shape(path, {name: list(tensor.shape) for name, tensor in tensors.items()})
    z_h, z_k = tensors["z_h"], tensors["z_k"]
    if not (z_h.is_floating_point() and z_k.is_floating_point() and z_h.isfinite().all() and z_k.isfinite().all()):
        raise UserError(f"{path}: holds values that are not finite numbers; extract it again")
    return Pair(z_h.half(), z_k.half(), Source(**json.loads(metadata["source"])) if "source" in metadata else None)


def read_shape(path: Path) -> Shape:
    """The shape of a pair, from the first bytes of its file.

    Raises:
        UserError: not zstd, no safetensors inside, or not a pair.
    """
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            size = int.from_bytes(reader.read(8), "little")
            header = json.loads(reader.read(min(size, MAX_HEADER)))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: cut short or not zstd ({error}); extract it again") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # an unclosed frame reads as nothing
        raise UserError(f"{path}: cut short or not zstd around safetensors ({error}); extract it again") from None
    return pair_shape(path, shapes)


def pair_shape(path: Path, shapes: dict[str, list[int]]) -> Shape:
    """The shape of a pair with tensors of these shapes.

    Raises:
        UserError: a tensor is missing, or the two are not of one grid.
    """
    missing = [name for name in ("z_h", "z_k") if name not in shapes]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}; expected z_h and z_k, found {', '.join(shapes) or 'nothing'}")
    z_h, z_k = shapes["z_h"], shapes["z_k"]
    if len(z_h) != 4 or len(z_k) != 4 or z_h[1:] != z_k[1:] or 0 in z_h + z_k:
        raise UserError(f"{path}: z_h is {z_h}, z_k is {z_k}; expected two [c, t, h, w] of one grid")
    return Shape(z_h[0], *z_k)


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


def clip_name(path: Path, root: Path) -> str:
    """What the clip of a pair file is called: its path in the folder, without the suffix."""
    return path.relative_to(root).as_posix().removesuffix(SUFFIX)


def find_manifests(root: str | Path) -> list[Path]:
    """The manifests of a folder and of those in it: extractions of several sizes may lie side by side."""
    return sorted(Path(root).rglob(MANIFEST))


def extractions(root: str | Path) -> list[str]:
    """The folders in it that were each extracted by themselves."""
    folders = (path.parent.relative_to(root).as_posix() for path in find_manifests(root))
    return [folder for folder in folders if folder != "."]


def read_manifest(root: str | Path) -> dict:
    """How the pairs of a folder were made: settings, and the VAEs by hash. Empty for folders that do not say.

    Of several extractions side by side, "settings" holds the settings of each, by folder.

    Raises:
        UserError: a manifest is unreadable, or the folders in it were made with different VAEs.
    """
    found = {path.parent.relative_to(root).as_posix(): own_manifest(path.parent) for path in find_manifests(root)}
    if set(found) <= {"."}:
        return found.get(".", {})
    (first, manifest), *others = found.items()
    for folder, other in others:
        for key in VAES:
            if not same_vae(other[key], manifest[key]):
                one, two = without_signature(manifest[key]), without_signature(other[key])
                raise UserError(
                    f"{root}: {first} and {folder} hold pairs of different VAEs "
                    f"({key}: {one}, {two}); an adapter is trained on those of one pair of VAEs"
                )
    return manifest | {"settings": {folder: each["settings"] for folder, each in found.items()}}


def own_manifest(folder: Path) -> dict:
    """The same of one extraction's folder, whatever lies in it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        weights_of(manifest)  # or a ValueError
        return {key: manifest[key] for key in ("settings", *VAES)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the manifest of an extraction; delete it, or extract again") from None


def same_vae(one: dict, other: dict) -> bool:
    """Whether two entries of manifests are of one VAE: of the same file, or of the same weights in two files."""
    if one["space"] != other["space"]:
        return False
    if one.get("sha256") == other.get("sha256"):
        return True
    signatures = [each["signature"] for each in (one, other) if each.get("signature")]
    return len(signatures) == 2 and same_weights(*signatures)


def weights_of(manifest: dict) -> dict[str, VAEWeights]:
    """The weights of the VAEs that a manifest names, by their spaces: for the adapters trained on its pairs.

    Raises:
        ValueError, KeyError, TypeError: it is not the manifest of an extraction.
    """
    return {manifest[key]["space"]: build(VAEWeights, manifest[key]) for key in VAES if key in manifest}


def without_signature(entry: dict) -> dict:
    """What a person reads of an entry of a manifest."""
    return {key: value for key, value in entry.items() if key != "signature"}


def read_spaces(root: str | Path) -> tuple[LatentSpace, LatentSpace]:
    """The spaces of z_h and z_k of a folder; those of the published pairs where it does not say.

    Raises:
        UserError: no such space.
    """
    manifest = read_manifest(root)
    if not manifest:
        return space("hunyuan_video"), space("kvae_3d_1.0")
    try:
        return space(manifest["hunyuan_vae"]["space"]), space(manifest["kvae"]["space"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}/{MANIFEST}: {error}") from None
