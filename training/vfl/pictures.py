"""Pictures that others made: from the bytes of a file to RGB, and from RGB to the size that the network is given.

# H/W pixels; pictures are uint8 [3, H, W], RGB
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError
from .draws import Draws

SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of the files in a shard
FORMATS = ("JPEG", "PNG", "WEBP")  # by content, whatever the name
MOST_BYTES = 64 << 20  # of a file
MOST_PIXELS = 1 << 26  # 8192 x 8192; as RGBA, 256 MiB
PATCH = 16  # pixels of a latent's side
BLACK, OPAQUE = (0, 0, 0), 255


warnings.filterwarnings("ignore", module=r"PIL\\.")  # on stderr, they would name no file


class PictureError(UserError):
    """A picture cannot be read. It is left out, and the others are used."""


class Box(NamedTuple):
    """A part of a picture, in pixels; `right` and `bottom` are the first column and row outside of it."""

    left: int
    top: int
    right: int
    bottom: int


def read_picture(data: bytes, background: tuple[int, int, int] = BLACK) -> Tensor:
    """A JPEG, PNG or WebP file as uint8 [3, H, W], turned as its EXIF says; of an animation, the first frame.

    Colour profiles are not applied, as diffusers does not apply them.

    Args:
        background: the colour, 0..255, over which transparent parts are laid.

    Raises:
        PictureError: not such a file, damaged, cut short, or too large.
    """
    return _decoded(data, lambda image: _rgb(image, background))


def read_opacity(data: bytes) -> Tensor | None:
    """The opacity of a picture, grey as uint8 [3, H, W], turned as `read_picture` turns it; None if all is opaque.

    Raises:
        PictureError: as `read_picture`.
    """
    opacity = _decoded(data, _opacity)
    return None if opacity.min() == OPAQUE else opacity


def parse_colour(text: str) -> tuple[int, int, int]:
    """The colour that --background names, as R,G,B from 0 to 255.

    Raises:
        UserError: it names none.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and len(part) < 4 and int(part) < 256 for part in parts):
        raise UserError(f"--background is {text}; expected a colour as R,G,B, each from 0 to 255")
    red, green, blue = map(int, parts)
    return red, green, blue


def jittered(height: int, width: int, ratio: float, jitter: float, draws: Draws) -> Box:
    """A part that is `ratio` of a picture's long side; the short side stays.

    Its centre is that of the picture, moved by up to `jitter` of the part's length, and it never leaves the picture.
    """
    long = max(height, width)
    length = min(long, max(1, round(ratio * long)))
    centre = long / 2 + draws.between(-jitter, jitter) * length
    start = min(max(0, round(centre - length / 2)), long - length)
    if width >= height:
        return Box(start, 0, start + length, height)
    return Box(0, start, width, start + length)


def bucket(height: int, width: int, target: int) -> tuple[int, int]:
    """The height and width that diffusers' pipeline gives a picture: multiples of 16 of its proportions, as far as 4:1.

    Args:
        target: the side, in pixels, of a square picture; `target_size` in the network's config.
    """
    return _processor().calculate_default_height_width(height, width, target)


def cropped(picture: Tensor, box: Box | None, size: tuple[int, int]) -> Tensor:
    """A part of a picture, or all of it, resized to cover `size` and cut to it from the centre, as the pipeline does.

    Args:
        picture: uint8 [3, H, W].
        size: height and width.
    """
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image = _processor().resize(image.crop(box) if box else image, *size, resize_mode="crop")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@cache
def _processor() -> Any:
    """The pipeline's own processor of pictures, so that what is trained on is what inference is given."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    return HunyuanVideo15ImageProcessor(vae_scale_factor=PATCH, do_resize=False)


def _decoded(data: bytes, use: Callable[[Image.Image], Image.Image]) -> Tensor:
    """What is made of a picture that is checked, decoded and turned, uint8 [3, H, W]."""
    if len(data) > MOST_BYTES:
        raise PictureError(f"{len(data):,} bytes; expected {MOST_BYTES:,} at most")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # before anything is decoded
                raise PictureError(f"{image.width:,} x {image.height:,} pixels; expected {MOST_PIXELS:,} at most")
            rgb = use(ImageOps.exif_transpose(image))
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # each format's decoder fails in its own ways
        what = "not a JPEG, PNG or WebP file" if isinstance(error, UnidentifiedImageError) else str(error)
        raise PictureError(f"{what or type(error).__name__}; expected a picture that can be read") from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _opacity(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return Image.new("RGB", image.size, (OPAQUE,) * 3)
    return image.convert("RGBA").getchannel("A").convert("RGB")


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # grey in 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        over = Image.new("RGBA", image.size, (*background, 255))
        over.alpha_composite(image.convert("RGBA"))
        image = over
    return image.convert("RGB")
