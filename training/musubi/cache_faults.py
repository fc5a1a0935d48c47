"""What the header of one cache file shows to be wrong, without reading a value.

# F latent frames, H/W latent rows and columns
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...kvae import WeightsError
from ...serving.architectures import ARCHITECTURES, CACHED, KANDINSKY, Architecture
from .cache_files import DTYPES, CacheHeader, CacheName, latent_frames, read_cache_header, tensor_shapes
from .encoders import nabla_size

AGAIN = "make it anew (--repair)"
RENAME = "rename it: musubi-tuner's next caching run would delete it"
SHORTS = {each.short: each for each in CACHED.values()}
_WARPED = 41  # frames from which on musubi-tuner's own tiles in time give Kandinsky 5 too many latents
_KEY = re.compile(r"(\w+?)(?:_(\d{1,9}x\d{1,9}x\d{1,9}))?_(?:" + "|".join(DTYPES) + ")")
_UNWRITTEN = ("latents_control", "vae_scaling_factor")  # Kandinsky 5's trainer reads them, no caching script makes them


@dataclass(frozen=True)
class Fault:
    """One line of the report.

    Attributes:
        file: the name of the file.
        again: whether it is mended by encoding the item once more.
    """

    file: str
    found: str
    expected: str
    advice: str = AGAIN

    @property
    def again(self) -> bool:
        return self.advice == AGAIN

    def __str__(self) -> str:
        return f"{self.file}: {self.found}; expected {self.expected}; {self.advice}"


@dataclass(frozen=True)
class CacheFile:
    """A cache whose name and header could be read, and whose metadata and name agree on the model."""

    path: Path
    name: CacheName
    architecture: Architecture
    header: CacheHeader

    @property
    def latents_key(self) -> str | None:
        """The key of its latents; None unless there is one of 4 axes."""
        keys = [key for key, shape in self.header.shapes.items() if base_of(key) == "latents" and len(shape) == 4]
        return keys[0] if len(keys) == 1 else None

    @property
    def grid(self) -> tuple[int, ...] | None:
        """F, H, W of its latents."""
        return self.header.shapes[self.latents_key][1:] if self.latents_key else None

    def fault(self, found: str, expected: str, advice: str = AGAIN) -> Fault:
        return Fault(self.path.name, found, expected, advice)


def base_of(key: str) -> str:
    """The key without grid and dtype, as musubi-tuner calls the tensor in a batch."""
    found = _KEY.fullmatch(key)
    return found.group(1) if found else key


def short_of(name: str) -> str:
    """What a file name ends with: "hv" of a cache of HunyuanVideo, "te" of any text cache."""
    return name.removesuffix(".safetensors").rsplit("_", 1)[-1]


def open_cache(path: Path, images: bool | None) -> CacheFile | Fault:
    """Read name and header of a file whose name ends like a cache of SHORTS.

    Args:
        images: whether it is in an image dataset's folder. None: not known; only caches of videos count frames.
    """
    try:
        header = read_cache_header(path)
    except WeightsError as error:
        return unreadable(path, error)
    architecture, named = SHORTS[short_of(path.name)], header.metadata.get("architecture", "")
    if named != architecture.name:
        found = f"the architecture in its metadata is {named[:60]!r}"
        return Fault(path.name, found, f"{architecture.name!r}, as its name says", _foreign(named))
    try:
        name = CacheName.parse(path.name, "frame_count" not in header.metadata if images is None else images)
    except ValueError as error:
        expected = str(error).split("expected ", 1)[1]
        return Fault(path.name, "not the name of a cache", expected, "rename or delete it: musubi-tuner stops at it")
    return CacheFile(path, name, architecture, header)


def unreadable(path: Path, error: WeightsError) -> Fault:
    found = str(error).removeprefix(f"{path}: ").rsplit("; ", 1)[0]
    return Fault(path.name, found, "a whole safetensors file")


def _foreign(named: str) -> str:
    if named in ARCHITECTURES:
        return f"rename it to end in _{ARCHITECTURES[named].short}.safetensors, or delete it"
    return "delete it: another VAE made it" if named else AGAIN


def header_faults(file: CacheFile) -> Iterator[Fault]:
    """Everything that is wrong with name, metadata and shapes of a file."""
    yield from _name_faults(file)
    yield from _frame_faults(file)
    yield from _size_faults(file)
    yield from _tensor_faults(file)


def _name_faults(file: CacheFile) -> Iterator[Fault]:
    name = file.name
    if name.file_name != file.path.name:
        yield file.fault("not the name that musubi-tuner gives", name.file_name, RENAME)
    for side, expected in (("width", name.width), ("height", name.height)):
        found = file.header.metadata.get(side, "")
        if found != str(expected):
            yield file.fault(f"{side} in its metadata is {found[:60]!r}", f"'{expected}', as its name says")


def _frame_faults(file: CacheFile) -> Iterator[Fault]:
    """Frames in name and metadata, and latents for them."""
    counted, named = file.header.metadata.get("frame_count"), file.name.frames
    if counted is not None and named is None:
        yield file.fault(
            f"its metadata count {counted[:60]!r} frames",
            "a name with _{start}-{frames} for a video, or no frame_count for an image",
        )
        return
    if counted != (None if named is None else str(named)):
        yield file.fault(f"frame_count in its metadata is {counted and counted[:60]!r}", f"'{named}', as its name says")
    if file.grid is None:
        return
    frames, expected = named or 1, latent_frames(named or 1, file.architecture)
    if file.grid[0] != expected:
        warped = is_kandinsky(file.architecture) and frames >= _WARPED and file.grid[0] > expected
        found = (
            f"{file.grid[0]} latents for {frames} frames" if named else f"{file.grid[0]} latents in an image's cache"
        )
        if warped:
            found += ", which musubi-tuner's own tiles in time give: they are warped in time"
        yield file.fault(found, str(expected))


def _size_faults(file: CacheFile) -> Iterator[Fault]:
    """Rows and columns of a video's latents, whose bucket is in the name. An image's name tells only its own size."""
    if file.grid is None or file.name.frames is None:
        return
    width, height = file.name.width, file.name.height
    if file.grid[1:] not in grids_of(width, height, file.architecture):
        expected = grids_text(width, height, file.architecture)
        yield file.fault(f"latents of {by(file.grid)} for {width}x{height} pixels", expected)


def grids_of(width: int, height: int, architecture: Architecture) -> list[tuple[int, int]]:
    """The H, W that latents of this many pixels can have: VAEs round odd sizes down or up."""
    side = architecture.space.spatial_factor
    sizes = [(height // side, width // side), (-(-height // side), -(-width // side))]
    if is_kandinsky(architecture):
        rows, columns = nabla_size(height, width)
        sizes.append((rows // side, columns // side))
    return sizes


def grids_text(width: int, height: int, architecture: Architecture) -> str:
    """The sizes of latents of this many pixels, in words."""
    return " or ".join(dict.fromkeys(by(sides) for sides in grids_of(width, height, architecture)))


def by(grid: tuple[int, ...]) -> str:
    """Columns and rows of latents, in words."""
    return f"{grid[-1]}x{grid[-2]}"


def is_kandinsky(architecture: Architecture) -> bool:
    return architecture.model == KANDINSKY


def _tensor_faults(file: CacheFile) -> Iterator[Fault]:
    """Tensors that are missing, too many, or not of the shape that the key says or the latents ask for."""
    shapes = file.header.shapes
    bases = [base_of(key) for key in shapes]
    if file.grid is None or 0 in file.grid:
        found = f"its tensors are {', '.join(sorted(shapes)[:3])[:120] or 'none'}"
        yield file.fault(found, "one latents_{F}x{H}x{W}_{dtype} of 4 axes, none of them 0")
        return
    all_shapes = tensor_shapes(file.architecture, file.grid, bool({"latents_image", "siglip"} & set(bases)))
    expected = {base_of(key): shape for key, shape in all_shapes.items()}
    listed = f"{', '.join(expected)} in a cache of {file.architecture.name}"
    for base in expected:
        if bases.count(base) != 1:
            yield file.fault(f"{base} is {'there twice' if base in bases else 'missing'}", listed)
    for key, base in zip(shapes, bases, strict=True):
        if base in expected:
            yield from _shape_faults(file, key, expected[base])
        elif not (is_kandinsky(file.architecture) and base.startswith(_UNWRITTEN)):
            yield file.fault(f"holds {key[:60]}, and musubi-tuner puts every tensor into the batch", f"only {listed}")


def _shape_faults(file: CacheFile, key: str, expected: tuple[int, ...]) -> Iterator[Fault]:
    shape, (_, grid) = file.header.shapes[key], _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
    if shape != expected:
        yield file.fault(f"{key} is {list(shape)}", str(list(expected)))
    elif grid != ("x".join(map(str, shape[1:])) if len(shape) == 4 else None):
        yield file.fault(f"{key} is {list(shape)}", "a key with its shape")
