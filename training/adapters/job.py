"""What a training is of, and whether that can be trained on: settled before the first step, the same to the last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...adapters.networks import NETWORKS
from ...adapters.spaces import LatentSpace
from ..data.dataset import Pairs, open_pairs
from ..data.manifests import read_manifest, read_spaces
from ..errors import UserError
from ..options import DEVICE, MOST_SEED, check_values, option
from ..runtime.places import check_apart
from ..runtime.processes import Processes
from .recipe import Recipe
from .ridge import Ridge

DIRECTIONS = ("h2k", "k2h")
BESIDE = ("train.json", "train.jsonl", "train.png", "report.html", "report.json", "model_card.md")  # the H→K adapter
VAL_PAIRS = 2000
LEAST_VARIANCE = 1e-6  # of latents, as a share of their mean square: float16 tells no less apart


@dataclass
class TrainConfig:
    latent_root: str = option(..., "folder of pairs, from extract or pack")
    val_latent_root: str = option("", "folder of pairs to validate on; without one, 1 video in 20 is held out")
    out_h2k: str = option("hunyuan_to_kvae.safetensors", "file for the Hunyuan → KVAE adapter", writes="file")
    out_k2h: str = option("kvae_to_hunyuan.safetensors", "file for the KVAE → Hunyuan adapter", writes="file")
    network: str = option("residual", "adapter network", choices=tuple(NETWORKS))
    epochs: int = option(20, "passes over the pairs", least=1)
    batch_size: int = option(8, "clips of a step, over all processes", least=1)
    lr: float = option(
        3e-3, "learning rate of Muon and AdamW; falls linearly to zero, except with --network published", above=0
    )
    weight_decay: float = option(1e-4, "weight decay of AdamW", least=0)
    ema: float = option(
        0.99, "decay of the weights' moving average, which is what is saved; 0 for none", least=0, below=1
    )
    seed: int = option(0, "of the first weights and of the order", least=0, most=MOST_SEED)
    device: str = option(DEVICE, "device to train on")


@dataclass(frozen=True)
class Job:
    """A training."""

    config: TrainConfig
    recipe: Recipe
    processes: Processes
    train: Pairs
    val: Pairs
    spaces: tuple[LatentSpace, LatentSpace]  # of z_h and of z_k
    fits: dict[str, Ridge]
    pairs: dict[str, Any]  # which they are, and how they were made

    @property
    def adapter_files(self) -> dict[str, Path]:
        return {"h2k": Path(self.config.out_h2k), "k2h": Path(self.config.out_k2h)}

    @property
    def folder(self) -> Path:
        return self.adapter_files["h2k"].parent

    @property
    def log_file(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def resume_file(self) -> Path:
        return resume_file(self.config)


def resume_file(config: TrainConfig) -> Path:
    """Where the state of an unfinished run is."""
    return Path(config.out_h2k).with_suffix(".resume.safetensors")


def check_config(config: TrainConfig) -> None:
    """Refuse settings that no training can have.

    Raises:
        UserError: names the setting, and what was expected.
    """
    check_values(config)
    h2k, k2h = Path(config.out_h2k), Path(config.out_k2h)
    beside = {name: h2k.parent / name for name in BESIDE}
    check_apart({"--out-h2k": h2k, "--out-k2h": k2h, "the state of an unfinished run": resume_file(config)} | beside)


def split(config: TrainConfig) -> tuple[Pairs, Pairs]:
    """Training and validation pairs. Clips of one video stay on one side."""
    pairs = open_pairs(config.latent_root)
    if config.val_latent_root:
        theirs, ours = (
            tuple(each.name for each in read_spaces(r)) for r in (config.val_latent_root, config.latent_root)
        )
        if theirs != ours:
            raise UserError(f"{config.val_latent_root}: pairs of {' and '.join(theirs)}; expected {' and '.join(ours)}")
        return pairs, open_pairs(config.val_latent_root).spread(VAL_PAIRS)
    of_pair = pairs.videos()
    videos = np.unique(of_pair)
    if len(videos) < 2:
        raise UserError(f"{config.latent_root}: pairs of one video only; none can be held out: give --val-latent-root")
    np.random.default_rng(config.seed).shuffle(videos)
    held_out = np.isin(of_pair, videos[: max(1, len(videos) // 20)])
    return pairs.take(~held_out), pairs.take(held_out).spread(VAL_PAIRS)


def what_pairs(config: TrainConfig, train: Pairs, val: Pairs) -> dict[str, Any]:
    """What must be the same for an unfinished training to go on."""
    return {
        "training pairs": {"pairs": len(train), "sha256": train.fingerprint()},
        "validation pairs": {"pairs": len(val), "sha256": val.fingerprint()},
        "VAEs": {key: value for key, value in read_manifest(config.latent_root).items() if key != "settings"},
    }


def check_channels(config: TrainConfig, train: Pairs, val: Pairs, spaces: tuple[LatentSpace, LatentSpace]) -> None:
    """Refuse pairs that are not of these spaces.

    Raises:
        UserError: names the folder.
    """
    h, k = spaces
    for pairs, root in ((train, config.latent_root), (val, config.val_latent_root or config.latent_root)):
        for shape in pairs.groups(None):
            if shape[:2] != (h.channels, k.channels):
                raise UserError(
                    f"{root}: holds pairs of {shape.channels_h} and {shape.channels_k} channels; expected {h.channels} "
                    f"({h.name}) and {k.channels} ({k.name})"
                )


def check_variance(config: TrainConfig, fits: dict[str, Ridge]) -> None:
    """Refuse latents of which every clip has the same.

    Raises:
        UserError: names the folder.
    """
    for name, latent in (("h2k", "z_k"), ("k2h", "z_h")):
        if fits[name].target_variance() <= LEAST_VARIANCE * fits[name].target_square():
            raise UserError(f"{config.latent_root}: {latent} is the same everywhere; there is nothing to learn from it")
