"""Pairs and the shards they are packed into, in the folders `pairs` and `shards` of a test's folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data import packing
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.pairs import Pair, read_pair, write_pair

MANIFEST = {
    "settings": {"height": 32},
    "hunyuan_vae": {"space": "a", "sha256": "1"},
    "kvae": {"space": "b", "sha256": "2"},
}


def make_pairs(folder: Path, names: list[str]) -> Path:
    """Write random pairs of these names, and a manifest."""
    for name in names:
        z = torch.randn(16, 3, 4, 6)
        write_pair(folder / f"{name}.safetensors.zst", Pair(z, z.flip(0), None))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


def pack(folder: Path, out: str = "shards") -> int:
    """Pack `pairs` into `shards` or into another folder next to it; return the exit code."""
    return main(["pack", "--latent-root", str(folder / "pairs"), "--output-root", str(folder / out)])


def unpack(folder: Path, out: str = "unpacked", shards: str = "shards") -> int:
    """Unpack `shards` into another folder next to it; return the exit code."""
    return main(["unpack", "--latent-root", str(folder / shards), "--output-root", str(folder / out)])


def make_packed(tmp_path, monkeypatch) -> Path:
    """Pack nine pairs into three shards; return the folder of both."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 3 * 2 * 16 * 3 * 4 * 6 * 2)
    make_pairs(tmp_path / "pairs", [f"v{i}" for i in range(9)])
    assert pack(tmp_path) == 0
    assert shard_names(tmp_path) == ["00000", "00001", "00002"]
    return tmp_path


def shard_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "shards").glob("*.safetensors"))


def check_same(folder: Path) -> None:
    """Check that the shards hold each of the pairs once."""
    files, store = open_pairs(folder / "pairs"), open_pairs(folder / "shards")
    assert sorted(store.name(i) for i in range(len(store))) == [files.name(i) for i in range(len(files))]
    for i in range(len(store)):
        assert torch.equal(store[i].z_h, read_pair(folder / "pairs" / f"{store.name(i)}.safetensors.zst").z_h)
