"""What a result was made of, kept in the result itself: so a run knows which results an earlier one has finished.

It is a text in the metadata of a video, a latent file or a picture; of a folder of pictures, in the first of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ...kvae.errors import WeightsError
from ...kvae.files import Weights
from ...kvae.paths import PARTIAL_PREFIX, PARTIAL_SUFFIX, file_errors, sha256_of, written_whole
from ...kvae.signature import signature
from ...serving.host_vae import HostVAE
from ..errors import UserError

KEY = "kvae_made_of"  # in the metadata


def made_of(source: Path, vae: HostVAE, settings: Mapping[str, Any]) -> str:
    """The text that tells results apart: of another source, of other weights, or with other settings.

    Raises:
        WeightsError: the source cannot be read.
    """
    models = [each for each in (vae.kvae, vae.vae.decode_adapter, vae.vae.encode_adapter) if each]
    weights = [signature(each.state_dict()) for each in models], str(next(vae.kvae.parameters()).dtype)
    about = {"source": sha256_of(source), "weights": hashlib.sha256(repr(weights).encode()).hexdigest()}
    return json.dumps(about | dict(settings))


def is_there(path: Path, made: str) -> bool:
    """Whether the result is there, complete, and made of the same.

    Raises:
        UserError: something else has its name.
        WeightsError: the path is not valid.
    """
    with file_errors(path):
        if not os.path.lexists(path):
            return False
    if _found(path) != made:
        raise UserError(
            f"{path}: is there already, and made of another file or with other settings; delete it, or choose another "
            "--output"
        )
    return True


def _found(path: Path) -> str | None:
    """What a result was made of; None if it does not say."""
    try:
        if path.is_dir():
            return _found(picture_in(path, 0))
        if not path.is_file():
            return None
        if path.suffix == ".mp4":
            with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
                return container.metadata.get(KEY)
        if path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                text = image.info.get(KEY) or image.info.get("comment")
            return text.decode(errors="replace") if isinstance(text, bytes) else text
        return Weights(path).metadata.get(KEY)
    except (WeightsError, av.FFmpegError, OSError, ValueError):
        return None


def write_picture(path: Path, frame_HW3: Tensor, made: str) -> None:
    """Write a frame, floats in 0..1, as PNG or, if the path ends in .jpg, as JPEG.

    Raises:
        WeightsError: the file cannot be written.
    """
    image = Image.fromarray((frame_HW3 * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous().numpy())
    with written_whole(path) as partial:
        if path.suffix == ".jpg":
            image.save(partial, "JPEG", quality=90, comment=made)
        else:
            text = PngImagePlugin.PngInfo()
            text.add_text(KEY, made)
            image.save(partial, "PNG", pnginfo=text)


def picture_in(folder: Path, i: int) -> Path:
    """The path of a frame in a folder of pictures, numbered from 0 as musubi-tuner does, with room for more."""
    return folder / f"{folder.name}_{i:05d}.png"


class PictureFile:
    """A picture of the first frame of a clip."""

    def __init__(self, path: Path, made: str):
        self.path, self.made = path, made

    def __enter__(self) -> PictureFile:
        return self

    def write(self, frames_THW3: Tensor) -> None:
        """Write the first of the frames [T, H, W, 3] in 0..1.

        Raises:
            WeightsError: the file cannot be written.
        """
        write_picture(self.path, frames_THW3[0], self.made)

    def __exit__(self, *_: object) -> None:
        pass


class PictureFolder:
    """A folder with a PNG of each frame, which appears when it is complete. A failure before that leaves no folder.

    Raises:
        WeightsError: the folder or a picture cannot be written.
    """

    def __init__(self, path: Path, made: str):
        self.path, self.made, self.frames = path, made, 0
        self.partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}{PARTIAL_SUFFIX}")

    def __enter__(self) -> PictureFolder:
        with file_errors(self.path):
            shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
            self.partial.mkdir(parents=True)
        return self

    def write(self, frames_THW3: Tensor) -> None:
        """Append frames [T, H, W, 3] in 0..1."""
        for frame in frames_THW3:
            write_picture(self.partial / picture_in(self.path, self.frames).name, frame, self.made)
            self.frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with file_errors(self.path):
                self.partial.rename(self.path)
        shutil.rmtree(self.partial, ignore_errors=True)
