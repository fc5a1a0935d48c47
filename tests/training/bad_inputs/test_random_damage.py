"""A randomly damaged file is read, or refused with the errors that commands print in one line."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import needs
from bad_rows import SECONDS, broken_off, make_job, make_saved
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.manifests import read_spaces
from kvae_comfyui.training.data.pairs import SUFFIX, Pair
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.runtime.log import read_log
from kvae_comfyui.training.runtime.trainer import open_state
from kvae_comfyui.training.vaes import TINY, load_hunyuan_vae, load_kvae_for_training

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

saved = pytest.fixture(scope="module")(make_saved)
FOREIGN = {  # kind of file: its path, and a function that reads all of it
    "pair": ("latents/v_Wave_g01_c01" + SUFFIX, lambda d: list(open_pairs(d / "latents"))),
    "shard": ("shards/00000.safetensors", lambda d: every_pair(d / "shards")),
    "index": ("shards/index.json", lambda d: every_pair(d / "shards")),
    "manifest": ("latents/manifest.json", lambda d: read_spaces(d / "latents")),
    "adapter": ("h2k.safetensors", lambda d: load_adapter(d / "h2k.safetensors").about()),
    "kvae": ("kvae.safetensors", lambda d: load_kvae_for_training(str(d / "kvae.safetensors"), "cpu")),
    "hunyuan": ("hunyuan.safetensors", lambda d: load_hunyuan_vae(str(d / "hunyuan.safetensors"), "cpu")),
    "state": ("a/h.resume.safetensors", lambda d: open_state(d / "a" / "h.resume.safetensors", NoSettings())),
    "log": ("a/train.jsonl", lambda d: read_log(d / "a" / "train.jsonl")),
}
DAMAGES = 25  # of each kind


@dataclass
class NoSettings:
    """Settings of a run that may resume from any state."""


def every_pair(root: Path) -> list[tuple[str, Pair]]:
    pairs = open_pairs(root)
    return [(pairs.name(i), pairs[i]) for i in range(len(pairs))]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut the data at random, or flip up to eight bits, mostly in the header."""
    if rng.random() < 0.3:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        end = min(len(data), 4096) if rng.random() < 0.7 else len(data)
        changed[rng.integers(end)] ^= 1 << rng.integers(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_damaged_file_is_read_or_refused(kind, job, saved, tmp_path):
    shutil.copytree(job, tmp_path, dirs_exist_ok=True, ignore=lambda folder, names: {"videos"} & set(names))
    shutil.copytree(saved / "a", tmp_path / "a")
    for name in ("hunyuan", "kvae"):
        shutil.copyfile(TINY[name], tmp_path / f"{name}.safetensors")
    name, read = FOREIGN[kind]
    good = (tmp_path / name).read_bytes()
    read(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(DAMAGES):
        (tmp_path / name).write_bytes(damaged(good, rng))
        with broken_off(SECONDS), suppress(UserError, WeightsError):
            read(tmp_path)
