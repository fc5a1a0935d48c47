"""The cache of texts and pictures, so that training loads neither text encoders nor SigLIP nor the VAE's encoder.

    cache.json                          what it was made with: `CacheInfo`
    DIGEST/texts/ab/ab12….safetensors   one prompt
    DIGEST/pictures/cd/cd34….safetensors  one part of one picture, in one size

A name is a hash of what the entry was made of. So nothing stale is ever read: it has another name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...kvae.files import Weights, save_weights
from ...kvae.foreign import build, parse_object
from ...kvae.paths import read_text, write_text
from ...kvae.signature import signature
from ..errors import UserError
from .conditions import Picture, Text
from .draws import Draws
from .pictures import Box, bucket, jittered

ABOUT = "cache.json"
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder", "vae")


@dataclass(frozen=True)
class CacheInfo:
    """What a cache was made with.

    Attributes:
        base: the name of the pipeline; of a path that tells about a machine, the last part.
        digest: of its encoders; see `digest_of`.
        target_size: of the network: the side of a square picture in pixels.
        crops: how many parts of each training picture there are; 1 is the whole picture.
        crop_ratio, crop_jitter: of these parts; see `pictures.jittered`.
    """

    base: str
    digest: str
    target_size: int
    crops: int = 1
    crop_ratio: float = 1.0
    crop_jitter: float = 0.0

    def view(self, data: bytes, height: int, width: int, crop: int | None) -> tuple[Box | None, tuple[int, int]]:
        """The part of a picture that is used, and the height and width that it is given.

        Args:
            data: of the picture's file, on which the part depends.
            height, width: of the picture, in pixels.
            crop: which part, 0 .. crops − 1; None is the whole picture.
        """
        if crop is None or self.crops == 1:
            return None, bucket(height, width, self.target_size)
        draws = Draws("crop", hashlib.sha256(data).hexdigest(), crop)
        box = jittered(height, width, self.crop_ratio, self.crop_jitter, draws)
        return box, bucket(box.bottom - box.top, box.right - box.left, self.target_size)


def digest_of(pipe: Any) -> str:
    """A hash of all that decides what the encoders of a pipeline make of a text or a picture."""
    found = [signature(getattr(pipe, name).state_dict()) for name in ENCODERS]
    dtypes = [str(getattr(pipe, name).dtype) for name in ENCODERS]
    lengths = [pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.prompt_template_encode_start_idx]
    return _hash([found, dtypes, lengths, pipe.system_message])


class ConditionFiles:
    """A cache that can be read, and added to by several processes at once."""

    def __init__(self, folder: Path, info: CacheInfo):
        self.info, self.folder = info, folder / info.digest[:16]

    def text_path(self, prompt: str) -> Path:
        """The file of a prompt."""
        return self._path("texts", _hash(prompt))

    def picture_path(self, data: bytes, box: tuple[int, ...] | None, size: tuple[int, int]) -> Path:
        """The file of a picture.

        Args:
            data: of the picture's own file.
            box: the part that is used; None is all of it.
            size: height and width that it was given.
        """
        return self._path("pictures", _hash([hashlib.sha256(data).hexdigest(), box, size]))

    def text(self, prompt: str) -> Text:
        """The states of a prompt.

        Raises:
            UserError: the cache lacks them.
            WeightsError: the file is damaged.
        """
        return Text(*_read(self.text_path(prompt), Text._fields, f"the prompt {prompt[:60]!r}"))

    def picture(self, data: bytes, box: tuple[int, ...] | None, size: tuple[int, int]) -> Picture:
        """The states of a picture. Arguments are those of `picture_path`, errors those of `text`."""
        return Picture(*_read(self.picture_path(data, box, size), Picture._fields, "a picture"))

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / name[:2] / f"{name}.safetensors"


def keep(path: Path, entry: Text | Picture) -> None:
    """Write an entry, completely or not at all.

    Raises:
        WeightsError: it cannot be written.
    """
    save_weights(path, entry._asdict(), {})


def begin_cache(folder: Path, info: CacheInfo) -> ConditionFiles:
    """A cache to add to. If other encoders made what is there, it stays, but is not read any longer.

    Raises:
        WeightsError: the folder cannot be written.
    """
    write_text(folder / ABOUT, json.dumps(asdict(info), indent=2) + "\n")
    return ConditionFiles(folder, info)


def open_cache(folder: Path) -> ConditionFiles:
    """A cache to read.

    Raises:
        UserError: it is not a cache.
        WeightsError: there is none, or it cannot be read.
    """
    path = folder / ABOUT
    text = read_text(path)
    try:
        return ConditionFiles(folder, build(CacheInfo, parse_object(text)))
    except ValueError as error:
        raise UserError(f"{path}: not a cache of conditions ({error}); make it anew: vfl-cache") from None


def _read(path: Path, names: tuple[str, ...], what: str) -> list[Any]:
    if not path.exists():
        raise UserError(
            f"{what} is not in the cache ({path.parent.parent}); run vfl-cache again, with the same settings"
        )
    weights = Weights(path)
    if set(weights.shapes) != set(names):
        raise UserError(f"{path}: it holds {', '.join(weights.shapes)}; delete it, and run vfl-cache again")
    return [weights[name] for name in names]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
