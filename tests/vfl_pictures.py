"""Folders of small pictures of identities, and data sets packed from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from kvae_comfyui.training.cli import main

COUNTS = (10, 20, 40, 80, 160)  # of the specification's balance check


def picture_bytes(number: int, form: str = "PNG", size: tuple[int, int] = (6, 4), **options) -> bytes:
    """A picture that differs from those of other numbers, as a file."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def make_folder(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """A folder for each identity, with as many pictures as it says."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:04d}.png").write_bytes(picture_bytes(first + i))
        first += count
    return root


def named(counts: tuple[int, ...]) -> dict[str, int]:
    """Names of identities, with these counts."""
    return {f"who{i}": count for i, count in enumerate(counts)}


def pack(pictures: Path | str, out: Path, *more: str) -> int:
    """Run vfl-pack."""
    argv = ["--pictures-root", str(pictures)] if pictures else []
    return main(["vfl-pack", *argv, "--output-root", str(out), *more])


def make_balance(root: Path) -> Path:
    """A data set, train only, with COUNTS pictures of five identities."""
    make_folder(root / "pictures", named(COUNTS))
    assert pack(root / "pictures", root / "set", "--val-share", "0") == 0
    return root / "set"
