"""Options of `train`, and the files it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...adapters.networks import NETWORKS
from ..options import DEVICE, MOST_SEED, check_values, option
from ..runtime.places import check_apart
from .recipe import EMA, LR, WEIGHT_DECAY

REPORTS = ("train.json", "train.jsonl", "train.png", "report.html", "report.json", "model_card.md")


@dataclass
class TrainConfig:
    latent_root: str = option(..., "folder of pairs, from extract or pack")
    val_latent_root: str = option("", "folder of pairs to validate on; without it, 1 video in 20 is held out")
    out_h2k: str = option("hunyuan_to_kvae.safetensors", "file for the Hunyuan → KVAE adapter", writes="file")
    out_k2h: str = option("kvae_to_hunyuan.safetensors", "file for the KVAE → Hunyuan adapter", writes="file")
    network: str = option("residual", "adapter network", choices=tuple(NETWORKS))
    epochs: int = option(20, "passes over the pairs", least=1)
    batch_size: int = option(8, "clips in a step, over all processes", least=1)
    lr: float = option(
        LR, "learning rate of Muon and AdamW; falls linearly to zero, except with --network published", above=0
    )
    weight_decay: float = option(WEIGHT_DECAY, "weight decay of AdamW", least=0)
    ema: float = option(
        EMA, "decay of the moving average of the weights; the average is saved; 0 for none", least=0, below=1
    )
    seed: int = option(0, "seed of the first weights and of the order of the pairs", least=0, most=MOST_SEED)
    device: str = option(DEVICE, "device to train on", metavar="DEVICE")


@dataclass(frozen=True)
class OutputFiles:
    """The files that a training writes. All but the K→H adapter lie in the folder of the H→K adapter."""

    adapters: dict[str, Path]  # by direction
    state: Path  # of an unfinished training

    @property
    def folder(self) -> Path:
        return self.adapters["h2k"].parent

    @property
    def log(self) -> Path:
        return self.folder / "train.jsonl"


def output_files(config: TrainConfig) -> OutputFiles:
    """Name the files that a training with these settings writes.

    Raises:
        UserError: an option is out of range, or two of the files are the same.
    """
    check_values(config)
    h2k, k2h = Path(config.out_h2k), Path(config.out_k2h)
    files = OutputFiles({"h2k": h2k, "k2h": k2h}, h2k.with_suffix(".resume.safetensors"))
    reports = {name: files.folder / name for name in REPORTS}
    check_apart({"--out-h2k": h2k, "--out-k2h": k2h, "the state of an unfinished run": files.state} | reports)
    return files
