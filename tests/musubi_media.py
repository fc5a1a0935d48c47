"""Media for musubi-tuner's datasets, and dataset configs that name them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from conftest import moving_picture
from made_videos import make


def clip(path: Path, frames: int = 21, height: int = 48, width: int = 64, caption: bool = True) -> Path:
    """A video of coloured waves, with its caption."""
    make(path, moving_picture(frames, height, width, seed=frames).permute(1, 2, 3, 0).numpy())
    return captioned(path) if caption else path


def picture(path: Path, height: int = 48, width: int = 64, mode: str = "RGB", seed: int = 0) -> Path:
    """An image of noise, with its caption."""
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb, "RGBA").convert(mode).save(path)
    return captioned(path)


def captioned(path: Path) -> Path:
    path.with_suffix(".txt").write_text("a caption\n")
    return path


def frame_folder(path: Path, frames: int = 9, height: int = 48, width: int = 64) -> Path:
    """A folder of images that is a video."""
    for n, frame in enumerate(moving_picture(frames, height, width).permute(1, 2, 3, 0).numpy()):
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path / f"{n:03d}.png")
    return path


def write_jsonl(path: Path, kind: str, media: Sequence[Path | str], **more: str) -> Path:
    lines = [json.dumps({f"{kind}_path": str(each), "caption": "a caption", **more}) for each in media]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(path: Path, *datasets: dict, **general: object) -> Path:
    """A dataset config in JSON."""
    path.write_text(json.dumps({"general": general, "datasets": list(datasets)}))
    return path
