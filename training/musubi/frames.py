"""Read frames and images, and resize them to buckets, to the last bit as musubi-tuner does.

It takes frames as they are stored: not rotated, not deinterlaced. A picture that grows is resized by Pillow's Lanczos,
any other by OpenCV's INTER_AREA (resize_image_to_bucket in dataset/media_utils.py).

# frames are uint8 [H, W, 3], RGB
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
from PIL import Image

from ...kvae.paths import check_regular
from ...serving.video_index import index_video
from ...serving.video_stream import FrameDecoder, open_video
from ..errors import UserError
from .buckets import Size
from .items import JPEG_XL, images_in
from .windows import Window

# by content, whatever the name; EPS among others is left out, as opening it runs a program
FORMATS = {"PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF", "JXL"}


@dataclass(frozen=True)
class Media:
    """What is known of a file before its frames are read.

    Attributes:
        frames: how many it has; 1 for an image.
        size: of the first frame.
        bytes: of the file, or of all files of a folder.
    """

    frames: int
    size: Size
    bytes: int


def probe(path: str, is_video: bool) -> Media:
    """Look at an image, a video, or a folder of images that is a video.

    Raises:
        UserError: it is damaged, cut short, or empty.
        WeightsError: it is missing, not an image or a video, or HDR.
    """
    if is_video and os.path.isdir(path):
        images = images_in(path)
        if not images:
            raise UserError(f"{path}: no images in this folder; expected the frames of a video")
        return Media(len(images), _image_size(images[0]), sum(map(os.path.getsize, images)))
    if not is_video:
        return Media(1, _image_size(path), os.path.getsize(path))
    index = index_video(path)
    if index.lost:
        raise UserError(f"{path}: {index.lost}")
    with open_video(path) as stream:
        frame = next(iter(FrameDecoder(path, stream)))
    return Media(index.count, (frame.width, frame.height), os.path.getsize(path))


def read_image(path: str, size: Size) -> np.ndarray:
    """An image in the size of its bucket. Transparency is dropped, not blended.

    Raises:
        UserError: it is damaged.
        WeightsError: it is missing.
    """
    with _opened(path) as image:
        image = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
        return to_bucket(image, size)


def read_windows(
    path: str, positions: Sequence[int], windows: Iterable[Window], size: Size
) -> Iterator[tuple[Window, list[np.ndarray]]]:
    """Yield each window with its frames, in the size of its bucket, by where windows end. The video is read once.

    Windows share their frames, and a frame is held no longer than a window that is still to come needs it.

    Args:
        positions: of the frames in the file that windows count.

    Raises:
        UserError: fewer frames can be read than the windows need.
        WeightsError: the video is damaged.
    """
    left = sorted(windows, key=lambda window: (window.stop, window.start))
    held: dict[int, np.ndarray] = {}
    n = -1
    for n, picture in enumerate(_pictures(path, positions)):
        if any(window.start <= n for window in left):
            held[n] = to_bucket(picture, size)
        while left and left[0].stop == n + 1:
            window = left.pop(0)
            yield window, [held[i] for i in range(window.start, window.stop)]
        if not left:
            return
        for i in [i for i in held if i < min(window.start for window in left)]:
            del held[i]
    raise UserError(f"{path}: only {n + 1} of {len(positions)} frames decode; convert it, or remove it")


def to_bucket(image: Image.Image, size: Size) -> np.ndarray:
    """A picture, RGB or RGBA, that fills a bucket: resized in its proportions, and cut from the centre."""
    if image.size == size:
        return np.ascontiguousarray(np.array(image)[..., :3])
    scale = max(bucket / side for bucket, side in zip(size, image.size, strict=True))
    width, height = (int(side * scale + 0.5) for side in image.size)
    if scale > 1:
        pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
    else:
        cv2 = opencv()
        pixels = cv2.resize(np.array(image), (width, height), interpolation=cv2.INTER_AREA)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    # a copy, or the whole resized picture would be held
    return np.ascontiguousarray(pixels[top : top + size[1], left : left + size[0], :3])


def opencv() -> ModuleType:
    """OpenCV, which no other command needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module("cv2")
    except ImportError:
        raise UserError(
            "musubi-tuner's frames need OpenCV, which is not installed: pip install opencv-python-headless"
        ) from None


def _pictures(path: str, positions: Sequence[int]) -> Iterator[Image.Image]:
    """The frames at these positions, in rising order."""
    if os.path.isdir(path):
        images = images_in(path)
        for position in positions:
            with _opened(images[position]) as image:
                yield image.convert("RGB")
        return
    wanted = iter(positions)
    awaited = next(wanted, None)
    with open_video(path) as stream:
        for i, frame in enumerate(FrameDecoder(path, stream)):
            if i == awaited:
                yield frame.to_image()
                awaited = next(wanted, None)
            if awaited is None:
                return


def _image_size(path: str) -> Size:
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An open image; its errors, also those of reading it, in one line."""
    check_regular(path)
    for name in JPEG_XL:
        if find_spec(name) is not None:
            import_module("jxlpy.JXLImagePlugin" if name == "jxlpy" else name)
    Image.init()
    try:
        with Image.open(path, formats=sorted(FORMATS & Image.OPEN.keys())) as image:
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from None
