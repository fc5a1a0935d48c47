"""One cache file of musubi-tuner: its name, its tensors, its metadata.

| | hunyuan_video (hv) | hunyuan_video_1.5 (hv15) | kandinsky5 (k5) |
|---|---|---|---|
| `latents_{F}x{H}x{W}_{dtype}` [c, F, H, W] | raw | raw | scaled |
| `latents_image_…`, always | | | [c, 2, H, W]: first and last latent |
| for image to video: `latents_image_…_float32` | | [c + 1, F, H, W]: first frame, mask | |
| for image to video: `siglip_float16` | | [729, 1152] | |

musubi-tuner stacks every tensor of a file into the batch, so there may be no others. It never reads the metadata.

# c channels, F latent frames, H/W latent rows and columns; z_cthw a latent of one clip, without a batch
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kvae.files import Weights, save_weights
from ...serving.architectures import Architecture

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1.0.1"
MADE_HERE = "kvae_vae_sha256"  # in the metadata of every cache that `cache` writes, and of no other
SIGLIP = (729, 1152)  # what SigLIP gives of a picture
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ABOVE_0 = r"(0{0,9}[1-9]\d{0,8})"
_NAME = re.compile(rf"(.*)_{_ABOVE_0}x{_ABOVE_0}_([^_]+)\.safetensors", re.DOTALL)
_WINDOW = re.compile(rf"(.*)_(\d{{1,9}})-{_ABOVE_0}", re.DOTALL)


@dataclass(frozen=True)
class CacheName:
    """The name of a cache file. The names of images are those with `frames` None.

    Attributes:
        stem: base name of the media file, without its last extension.
        start, frames: the window in a video, in frames after its frame rate was fitted.
        width, height: pixels; of a video the size of its bucket, of an image its ORIGINAL size.
        short: the end of the name, see `Architecture.short`.
    """

    stem: str
    start: int
    frames: int | None
    width: int
    height: int
    short: str

    @property
    def file_name(self) -> str:
        window = "" if self.frames is None else f"_{self.start:05d}-{self.frames:03d}"
        return f"{self.stem}{window}_{self.width:04d}x{self.height:04d}_{self.short}.safetensors"

    @property
    def text_name(self) -> str:
        """The name of the text cache, which all windows of a video share."""
        return f"{self.stem}_{self.short}_te.safetensors"

    @classmethod
    def parse(cls, name: str, image: bool = False) -> CacheName:
        """Read a file name, split at "_" from the right as musubi-tuner does. Zeros in front may be missing.

        Args:
            image: read the name of an image, whose stem may end like a window in a video.

        Raises:
            ValueError: not the name of a cache of latents.
        """
        found = _NAME.fullmatch(name)
        if not found:
            raise ValueError(
                f"{name}: expected {{stem}}_{{start}}-{{frames}}_{{width}}x{{height}}_{{model}}.safetensors, "
                "or without _{start}-{frames} for an image"
            )
        stem, width, height, short = found.groups()
        window = None if image else _WINDOW.fullmatch(stem)
        stem, start, frames = window.groups() if window else (stem, "0", "")
        return cls(stem, int(start), int(frames) if frames else None, int(width), int(height), short)


@dataclass(frozen=True)
class FirstFrame:
    """What HunyuanVideo 1.5 needs of the first frame to train image to video.

    Attributes:
        z_cthw: [32, 1, H, W] raw, the mode of the first frame encoded alone.
        siglip: [729, 1152], the last hidden state of SigLIP.
    """

    z_cthw: Tensor
    siglip: Tensor


@dataclass(frozen=True)
class CacheHeader:
    """The header of a cache file: texts, and the shape of each tensor."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def latent_frames(frames: int, architecture: Architecture) -> int:
    """Latents of a clip: ⌊(frames − 1) / 4⌋ + 1, as frames after the last whole latent are dropped."""
    return (frames - 1) // architecture.space.temporal_factor + 1


def tensor_shapes(
    architecture: Architecture, grid: Sequence[int], first_frame: bool = False, dtype: str = "float16"
) -> dict[str, tuple[int, ...]]:
    """The shapes of a cache's tensors, by key.

    Args:
        grid: F, H, W of the latents.
        first_frame: whether it is for training image to video.
        dtype: of the latents, as in their key.
    """
    channels = architecture.space.channels
    shapes = {_key("latents", grid, dtype): (channels, *grid)}
    if architecture.ends:
        ends = 2, *grid[1:]
        shapes[_key("latents_image", ends, dtype)] = channels, *ends
    if architecture.first_frame and first_frame:
        shapes |= {_key("latents_image", grid, "float32"): (channels + 1, *grid), "siglip_float16": SIGLIP}
    return shapes


def _key(name: str, grid: Sequence[int], dtype: str) -> str:
    return f"{name}_{'x'.join(map(str, grid))}_{dtype}"


def write_cache(
    path: str | os.PathLike,
    architecture: Architecture,
    z_cthw: Tensor,
    width: int,
    height: int,
    frame_count: int | None = None,
    first_frame: FirstFrame | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the cache of a clip or an image, completely or not at all. NaN become 0, with a warning.

    Args:
        z_cthw: [c, F, H, W] raw, float, on any device.
        width, height: as in the file's name.
        frame_count: frames of the clip; None for an image.
        first_frame: for HunyuanVideo 1.5, to train image to video.
        metadata: more texts for the header, such as what encoded it.
        dtype: of the latents, one of DTYPES.

    Raises:
        ValueError: the latent does not fit the architecture or frame_count.
        WeightsError: the file cannot be written.
    """
    _check(architecture, z_cthw, frame_count, first_frame)
    texts = {**(metadata or {}), "architecture": architecture.name, "width": str(width), "height": str(height)}
    texts["format_version"] = FORMAT_VERSION
    if frame_count is not None:
        texts["frame_count"] = str(frame_count)
    z_cthw = (architecture.space.scale(z_cthw.float()) if architecture.scaled else z_cthw).to(dtype)
    parts = [z_cthw]
    if architecture.ends:
        parts.append(z_cthw[:, [0, -1]])
    if first_frame is not None:
        parts += [_masked(first_frame.z_cthw, z_cthw.shape[1]), first_frame.siglip.half()]
    name = str(dtype).removeprefix("torch.")
    keys = tensor_shapes(architecture, z_cthw.shape[1:], first_frame is not None, name)
    tensors = dict(zip(keys, parts, strict=True))
    save_weights(path, {key: _without_nan(path, key, tensor) for key, tensor in tensors.items()}, texts)


def read_cache_header(path: str | os.PathLike) -> CacheHeader:
    """Read the header of a cache file, and no values. What it says is not judged here.

    Raises:
        WeightsError: the file is missing, truncated, or not a safetensors file.
    """
    weights = Weights(path)
    return CacheHeader(weights.metadata, weights.shapes)


def _check(architecture: Architecture, z_cthw: Tensor, frame_count: int | None, first_frame: FirstFrame | None) -> None:
    frames = latent_frames(frame_count or 1, architecture)
    channels = architecture.space.channels
    if z_cthw.ndim != 4 or z_cthw.shape[:2] != (channels, frames):
        raise ValueError(
            f"a latent for {architecture.name} is {list(z_cthw.shape)}; {frame_count or 1} frames have "
            f"[{channels}, {frames}, H, W]"
        )
    if first_frame is not None and not architecture.first_frame:
        raise ValueError(f"{architecture.name} caches hold no first frame; only HunyuanVideo 1.5's do")


def _masked(first_cthw: Tensor, frames: int) -> Tensor:
    """[c, 1, H, W] → float32 [c + 1, F, H, W]: the latent and a mask of ones in frame 0, zeros in all others."""
    first = torch.cat([first_cthw.float(), torch.ones_like(first_cthw[:1], dtype=torch.float32)])
    return torch.nn.functional.pad(first, (0, 0, 0, 0, 0, frames - 1))


def _without_nan(path: str | os.PathLike, key: str, tensor: Tensor) -> Tensor:
    nan = tensor.isnan()
    if not nan.any():
        return tensor
    logger.warning(f"{path}: {int(nan.sum())} of {tensor.numel()} values of {key} are NaN; replaced by 0")
    return tensor.masked_fill(nan, 0)
