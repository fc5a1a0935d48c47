"""Encode videos and images with KVAE into latent files of another model, one after the other.

    python -m training encode videos/ --space hunyuan_video --output latents --format musubi \\
        --kvae KVAE-3D-1.0 --adapter-k2h k2h.safetensors

The same command continues after an interruption. Frames are read as they are encoded, so memory grows with the length
of a video by its latent only, which takes a fiftieth of the memory of its frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.spaces import SPACES, LatentSpace
from ...kvae import SEGMENT_FRAMES, padded_frames
from ...kvae.pixels import HUNYUAN_HALF_RANGE, to_unit
from ...serving.display import Picture
from ...serving.fit import fit_picture
from ...serving.host_vae import HostVAE
from ...serving.latent_writers import ENDINGS, check_format, save_clip
from ...serving.video_index import index_video
from ...serving.video_reader import read_pictures
from ..data.videos import EXTENSIONS
from ..errors import UserError
from ..options import MOST_SIDE, argument, option
from ..served import ServedOptions, load_served
from .bulk import Bulk, Progress
from .made import KEY, made_of
from .sources import Source, find_sources

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(kw_only=True)
class EncodeConfig(ServedOptions):
    videos: list[str] = argument("videos, images, and folders of them", "VIDEO")  # noqa: RUF009
    output: str = option(..., "folder to write to", writes="folder")
    space: str = option("hunyuan_video", "the space of the latents", tuple(SPACES))
    format: str = option(
        "comfyui",
        "which program is to read the files: ComfyUI (.latent), musubi-tuner (--latent_path), diffusers or Kandinsky",
        choices=tuple(ENDINGS),
    )
    height: int = option(
        0, "height in pixels; 0 takes the video's own size, cut to whole latents", least=0, most=MOST_SIDE
    )
    width: int = option(
        0, "width in pixels; pictures are cut to the proportions of both, then resized", least=0, most=MOST_SIDE
    )


@dataclass(frozen=True)
class Task:
    """A video or an image to encode, of `count` frames, in pictures of height x width."""

    source: Source
    path: Path
    made: str
    count: int
    height: int
    width: int


@torch.inference_mode()
def run(config: EncodeConfig) -> int:
    """Encode all videos; return the exit code."""
    _check(config, SPACES[config.space])
    sources = find_sources(config.videos, (*EXTENSIONS, *IMAGES))
    vae, bulk, tasks = load_served(config, config.space, ("encode",)), Bulk("encoded", len(sources)), []
    _check_size(config, vae.side)
    for source in sources:
        with bulk.file(source.path):
            task = _task(source, vae, config)
            bulk.take(source.path, [task.path], task.made)
            tasks.append(task)
    left = [task for task in tasks if bulk.left(task.source.path)]
    with Progress("encode", [task.count * task.height * task.width for task in left]) as progress:
        for task in left:
            vae.on_progress = progress.of_file(task.count * task.height * task.width)
            with bulk.file(task.source.path):
                _encode(task, vae, config.format)
                bulk.made.add(task.source.path)
    return bulk.finish(config.output)


def _check(config: EncodeConfig, space: LatentSpace) -> None:
    try:
        check_format(config.format, space)
    except ValueError as error:
        raise UserError(f"--format is {config.format}, --space is {config.space}: {error}") from None
    _check_size(config, space.spatial_factor)


def _check_size(config: EncodeConfig, side: int) -> None:
    sides = config.height, config.width
    if any(sides) and (not all(sides) or any(each % side for each in sides)):
        raise UserError(
            f"--height is {config.height}, --width is {config.width}; expected both, in multiples of {side}, for "
            f"{config.space}; without them, a video keeps its own size"
        )


def _task(source: Source, vae: HostVAE, config: EncodeConfig) -> Task:
    """What is to be made of a video.

    Raises:
        UserError, WeightsError: it cannot be read, is cut short, or is smaller than a latent.
    """
    index, side = index_video(source.path), vae.side
    if index.lost:
        raise UserError(f"{source.path}: {index.lost}")
    height, width = config.height, config.width
    if not height:
        picture = next(read_pictures(source.path, range(1)))
        rows, columns = picture.rgb.shape[:2]
        height, width = (n // side * side for n in (rows, round(columns * picture.pixel_aspect)))
        if not height or not width:
            raise UserError(f"{source.path}: {columns}x{rows} pixels; expected at least {side}x{side}")
    settings = {"space": vae.space.name, "format": config.format, "height": height, "width": width}
    path = Path(config.output, source.name + ENDINGS[config.format])
    return Task(source, path, made_of(source.path, vae, settings), index.count, height, width)


def _encode(task: Task, vae: HostVAE, form: str) -> None:
    """Encode one video, and write its latent."""
    read = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal read
        read, pictures = 0, read_pictures(task.source.path, range(task.count))
        while some := list(islice(pictures, SEGMENT_FRAMES)):
            read += len(some)
            frames = [_fitted(picture, task.height, task.width, vae.side) for picture in some]
            del some  # before they are encoded
            yield to_unit(torch.stack(frames, dim=1)[None], HUNYUAN_HALF_RANGE)

    shape = 1, 3, padded_frames(task.count, vae.space.temporal_factor), task.height, task.width
    z = vae.encode_stream(chunks, shape).float().cpu()
    save_clip(task.path, z, vae.space, read, form, {KEY: task.made}, vae.vae.weights_written)


def _fitted(picture: Picture, height: int, width: int, side: int) -> Tensor:
    """A picture as uint8 [3, height, width]. If that is its size, less a part of a latent, the rest is cut off."""
    (rows, columns), square = picture.rgb.shape[:2], picture.pixel_aspect == 1
    if not (square and 0 <= rows - height < side and 0 <= columns - width < side):
        return fit_picture(picture, height, width)
    top, left = (rows - height) // 2, (columns - width) // 2
    return torch.from_numpy(picture.rgb[top : top + height, left : left + width]).permute(2, 0, 1)
