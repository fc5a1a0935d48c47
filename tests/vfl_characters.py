"""Made characters: each is a pattern of colours, and each of its pictures shows it in other light, at another place."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

import needs
from kvae_comfyui.training.vfl.shards import SPLITS, Picture, manifest_path, shard_path, write_manifest, write_shard
from kvae_comfyui.training.vfl.tiny import tiny_dinov3


def character(number: int, picture: int) -> bytes:
    """A PNG of 40x32 pixels."""
    pattern = np.random.default_rng(number).uniform(0.1, 0.9, (4, 4, 3))
    rng = np.random.default_rng((number, picture))
    seen = np.kron(pattern, np.ones((10, 8, 1))) * rng.uniform(0.97, 1.03)
    seen = np.roll(seen, rng.integers(-1, 2, 2), (0, 1)) + rng.normal(0, 0.02, seen.shape)
    out = io.BytesIO()
    Image.fromarray((seen.clip(0, 1) * 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def make_characters(root: Path, identities: int = 12, pictures: int = 6, **columns: list[str]) -> Path:
    """A data set; val shows other pictures of the identities of train.

    Args:
        columns: more columns of train's manifest.
    """
    needs.package("webdataset", "requirements-vfl.txt")
    for split, first in zip(SPLITS, (0, 1000), strict=True):
        made = [(number, i) for i in range(first, first + pictures) for number in range(identities)]
        shard = [Picture(f"{n:03d}-{i}", "png", character(n, i), f"n{n:03d}", f"{n}/{i}.png") for n, i in made]
        write_shard(shard_path(root, split, 0), "identity", shard)
        counts = {f"n{number:03d}": pictures for number in range(identities)}
        write_manifest(manifest_path(root, split), "identity", counts)
    if columns:
        path = manifest_path(root, "train")
        head, *rows = path.read_text().splitlines()
        more = zip(*columns.values(), strict=True)
        lines = [",".join((head, *columns)), *(",".join((row, *cells)) for row, cells in zip(rows, more, strict=True))]
        path.write_text("\n".join(lines) + "\n")
    return root


def save_dinov3(folder: Path, seed: int = 0) -> Path:
    """A small random DINOv3, as transformers writes it."""
    needs.package("transformers", "requirements-vfl.txt")
    tiny_dinov3(seed).save_pretrained(folder)
    return folder
