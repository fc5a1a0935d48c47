"""Set up the training of an identity head: pictures, backbone, head. What cannot be trained is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..options import DEVICE, MOST_SEED, check_values, option
from ..runtime.places import check_apart
from ..runtime.processes import Processes
from ..runtime.trainer import Trainer, copied
from .backbone import load_backbone
from .batches import Batches
from .identity import Backbone, Head
from .index import Index, pictures_hash
from .pictures import parse_colour
from .schedule import Cosine
from .shards import IDENTITY_KEY
from .views import Views

WARMUP = 0.05  # share of the steps
MOST_WIDTH = 1 << 16  # of a layer
NEAREST = "nearest"  # name of the class means among the tensors of the state
NAMES = {  # of the files that a training writes into its folder
    "best": "head.safetensors",
    "last": "head.last.safetensors",
    "state": "head.resume.safetensors",
    "log": "head.jsonl",
    "settings": "head.json",
}


@dataclass
class VflHeadConfig:
    data_root: str = option(..., "data set, from vfl-pack, with the splits train and val")
    backbone: str = option(..., "DINOv3 ViT to build on: folder or hub id", metavar="MODEL")
    output_root: str = option(..., "folder for the heads, the log and the report", writes="folder")
    dims: str = option("512,256", "widths of the head's layers; the last is that of the embedding", metavar="WIDTHS")
    dropout: float = option(0.1, "share of the values between the layers that a step leaves out", least=0, below=1)
    temperature: float = option(
        0.1, "number by which the loss divides cosines; the smaller, the more the hardest pairs count", above=0
    )
    identities: int = option(32, "identities in a batch, over all processes", least=2)
    pictures: int = option(2, "pictures of each identity in a batch", least=2)
    groups: str = option("", "column of the manifest; half of a batch is of one group", metavar="COLUMN")
    nearest: bool = option(False, "half of a batch is of identities that the last validation's head finds alike")
    steps: int = option(4000, "optimiser steps", least=1)
    lr: float = option(5e-4, "peak learning rate of AdamW; half a cosine down to zero", above=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", least=0)
    crop_ratio: float = option(0.9, "share of a picture's long side that is shown", above=0, most=1)
    crop_jitter: float = option(
        0.06, "how far a part may lie from the centre, as a share of its length", least=0, most=1
    )
    flip: bool = option(False, "mirror half of the pictures")
    colour: float = option(0.0, "brightness, contrast and saturation change by a factor of 1 ± this", least=0, most=1)
    blur: float = option(0.0, "standard deviation of a blur at most, in pixels of DINOv3's square", least=0, most=64)
    noise: float = option(0.1, "standard deviation of noise at most, in pixels of 0..1; 0 for none", least=0, most=1)
    background: str = option("0,0,0", "colour under transparent parts, from 0 to 255", metavar="R,G,B")
    val_every: int = option(250, "steps from one validation to the next", least=1)
    identity_key: str = option(IDENTITY_KEY, "key of the identity in a sample's JSON, and its column", metavar="KEY")
    seed: int = option(0, "seed of the first weights and of the batches", least=0, most=MOST_SEED)
    device: str = option(DEVICE, "device to train on", metavar="DEVICE")


@dataclass
class Progress:
    """What a training counts in addition to its steps. The fields are the names in the state file."""

    validated: int = -1  # step of the last validation
    loss_sum: float = 0.0  # of the steps since then
    rows: int = 0  # of the log
    last: dict[str, float] = field(default_factory=dict)  # figures of the last validation, of the best and of the first
    best: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)

    def check(self, step: int, every: int) -> None:
        """Raise ValueError unless a training can have this progress after `step` steps."""
        if not (0 <= self.validated <= step <= self.validated + every and self.rows > 0):
            raise ValueError(f"validated at step {self.validated} of {step}, {self.rows} rows in the log")
        if not all("gap" in each for each in (self.last, self.best, self.first)):
            raise ValueError("figures without a gap")


@dataclass(frozen=True)
class HeadTraining:
    """A training: its trainer, which changes with every step, and everything that stays the same.

    Attributes:
        data: hashes of what it trains on, by name.
        skipped: pictures that this process could not read, as "id: reason".
        trainer: with the best head so far as extra "best", and the class means as NEAREST.
    """

    config: VflHeadConfig
    processes: Processes
    folder: Path
    backbone: Backbone
    train: Batches
    val: Batches
    views: Views
    data: dict[str, str]
    trainer: Trainer[Head, Progress]
    skipped: set[str] = field(default_factory=set)

    @property
    def head(self) -> Head:
        return self.trainer.models["head"]

    @property
    def hidden(self) -> bool | None:
        """What tqdm's `disable` is: None in the first process, where tqdm looks for a terminal."""
        return None if self.processes.main else True

    def file(self, name: str) -> Path:
        """One of NAMES, in the folder."""
        return self.folder / NAMES[name]


def set_up(config: VflHeadConfig, backbone: Backbone | None = None) -> HeadTraining:
    """Open the pictures and the backbone, and build the head.

    Args:
        backbone: replaces the one that the config names.

    Raises:
        UserError: an option is out of range, the pictures cannot be trained on, the backbone is not one, the state of
            an unfinished training does not fit, or the processes see different pictures.
    """
    check_values(config)
    widths, background = parse_widths(config.dims), parse_colour(config.background)
    folder = Path(config.output_root)
    check_apart({name: folder / file for name, file in NAMES.items()})
    processes = Processes(config.device)
    config = replace(config, device=str(processes.device))
    if config.identities < processes.count:
        raise UserError(f"--identities is {config.identities}, for {processes.count} processes; expected one for each")
    train, val = (Index(config.data_root, split, config.identity_key) for split in ("train", "val"))
    backbone = (backbone or load_backbone(config.backbone, config.device)).to(config.device)
    data = {"pictures": pictures_hash(train, val), "backbone": backbone.digest}
    if any(theirs != data for theirs in processes.gather(data)):
        raise UserError(f"{config.data_root}: the processes do not see the same pictures and backbone")
    trainer = new_trainer(config, (backbone.width, *widths), len(train.identities))
    views = Views(
        backbone.side,
        *(config.crop_ratio, config.crop_jitter, config.flip, config.colour, config.blur, config.noise, background),
    )
    return HeadTraining(
        config, processes, folder, backbone, train_batches(config, train, trainer), val_batches(config, val),
        views, data, trainer,
    )  # fmt: skip


def new_trainer(config: VflHeadConfig, dims: Sequence[int], identities: int) -> Trainer[Head, Progress]:
    """A head with random weights, and its optimiser."""
    torch.manual_seed(config.seed)
    head = Head(dims, dropout=config.dropout).to(config.device)
    optimiser = torch.optim.AdamW(head.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = Cosine(config.lr, config.steps, max(1, round(WARMUP * config.steps)))
    trainer = Trainer({"head": head}, [optimiser], schedule, ema=0, progress=Progress())
    trainer.extra = {"best": copied(head.state_dict())}
    if config.nearest:
        zeros = torch.zeros(identities, dims[-1], device=config.device)
        trainer.extra[NEAREST] = {"running": zeros, "means": zeros.clone()}
    return trainer


def train_batches(config: VflHeadConfig, index: Index, trainer: Trainer[Head, Progress]) -> Batches:
    """The batches to train on, half of each from identities that are hard to tell apart if that is asked for.

    Raises:
        UserError: there is no such column, or too few identities.
    """
    if config.groups and config.nearest:
        raise UserError("--groups and --nearest both say what half of a batch is of; choose one")
    if config.groups and config.groups not in index.columns:
        there = ", ".join(index.columns) or "none"
        raise UserError(f"--groups {config.groups}: no such column in train's manifest; its further columns: {there}")
    near = None
    if config.groups:
        group = index.columns[config.groups]
        members: dict[str, list[int]] = {}
        for i, name in enumerate(group):
            members.setdefault(name, []).append(i)
        near = lambda i: members[group[i]] if group[i] else []  # noqa: E731
    elif config.nearest:
        near = lambda i: nearest(trainer.extra[NEAREST]["means"], i, config.identities // 2)  # noqa: E731
    return Batches(index, config.identities, config.pictures, near)


def nearest(means: Tensor, i: int, count: int) -> list[int]:
    """The identities whose means have the largest cosine with that of identity i, itself left out.

    Args:
        means: [identities, E]; zeros for identities that were not seen yet, which are not among the result.
    """
    unit = torch.nn.functional.normalize(means, dim=1)
    cosines = (unit @ unit[i]).masked_fill(~means.any(1), -2)
    cosines[i] = -2
    best = cosines.topk(min(count, len(cosines)))
    return [j for j, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True) if cosine > -2]


def val_batches(config: VflHeadConfig, index: Index) -> Batches:
    """The batches to validate on; they may have fewer identities.

    Raises:
        UserError: fewer than two identities have enough pictures.
    """
    enough = int((index.counts >= config.pictures).sum())
    if enough < 2:
        raise UserError(
            f"{config.data_root}: {enough} identities of the split val have {config.pictures} pictures or more; "
            "expected 2: pack with a larger --val-share"
        )
    return Batches(index, min(config.identities, enough), config.pictures)


def parse_widths(text: str) -> list[int]:
    """The numbers of --dims.

    Raises:
        UserError: these are none.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 7 and 0 < int(part) <= MOST_WIDTH for part in parts):
        raise UserError(f"--dims is {text}; expected widths as 512,256, each from 1 to {MOST_WIDTH:,}")
    return [int(part) for part in parts]
