"""Validate an identity head: how well it tells the identities of the split val apart, and which head is the best."""

from __future__ import annotations

import math
from contextlib import closing
from copy import deepcopy
from itertools import chain
from operator import itemgetter

import torch
from tqdm import tqdm

from ..errors import UserError
from ..runtime.ahead import in_order
from ..runtime.log import add_to_log
from ..runtime.places import shareable
from ..runtime.trainer import copied
from .contrast import Compared, compare, figures
from .head_files import made_for, save_head
from .head_setup import NEAREST, HeadTraining


@torch.no_grad()
def validate(training: HeadTraining) -> None:
    """Compare the pictures of val, keep the head if its gap is the widest so far, and write the files of both heads.

    Raises:
        UserError: the mean loss since the last validation is not finite, and further steps would not make it so; or the
            pictures of val cannot be read.
    """
    processes, trainer, progress = training.processes, training.trainer, training.trainer.progress
    processes.from_first(list(trainer.tensors().values()))  # whose head is saved; others may round differently
    row = trained(training)
    found = figures(compared(training))
    progress.validated, progress.loss_sum, progress.last = trainer.step, 0.0, found
    progress.first = progress.first or found
    if not progress.best or found["gap"] > progress.best["gap"]:
        progress.best = found | {"step": trainer.step}
        trainer.extra["best"] = copied(training.head.state_dict())
    if training.config.nearest:
        trainer.extra[NEAREST]["means"] = trainer.extra[NEAREST]["running"].clone()
    progress.rows += 1
    if processes.main:
        add_to_log(training.file("log"), row | {f"val_{key}": value for key, value in found.items()})
        if trainer.step:  # the random head of a new run must not replace that of the run before
            write_heads(training)
    processes.say(line(row, found))


def trained(training: HeadTraining) -> dict[str, float]:
    """The step, and the mean loss since the last validation.

    Raises:
        UserError: it is not finite.
    """
    trainer, progress = training.trainer, training.trainer.progress
    row: dict[str, float] = {"step": trainer.step}
    if taken := trainer.step - progress.validated if trainer.step else 0:
        row |= {"train_loss": progress.loss_sum / taken, "lr": trainer.schedule.rate(trainer.step - 1)}
        if not math.isfinite(progress.loss_sum):
            if training.processes.main:
                training.file("state").unlink(missing_ok=True)
            raise UserError(f"the loss is {progress.loss_sum} before step {trainer.step}: lower --lr")
    return row


def compared(training: HeadTraining) -> list[Compared]:
    """The batches of val, shared out to the processes, in each process.

    Raises:
        UserError: no batch has two identities whose pictures can be read.
    """
    config, processes, val = training.config, training.processes, training.val
    batches = list(enumerate(val.sweeps()))[processes.rank :: processes.count]
    training.head.eval()
    mine = []
    with closing(in_order(lambda each: (each[0], *val.swept(each[1], training.views.whole)), batches)) as stream:
        for number, samples, skipped in tqdm(stream, "validate", len(batches), leave=False, disable=training.hidden):
            training.skipped.update(skipped)
            who = torch.tensor([sample.identity for sample in samples])
            if len(who.unique()) > 1:
                pictures = torch.stack([sample.picture for sample in samples]).to(processes.device)
                f_NE = training.head(training.backbone(pictures))
                mine.append((number, compare(f_NE, who, config.temperature)))
    found = sorted(chain.from_iterable(processes.gather(mine)), key=itemgetter(0))
    if not found:
        raise UserError(f"{config.data_root}: no two identities of val have pictures that can be read; pack them again")
    return [part for _, part in found]


def line(row: dict[str, float], found: dict[str, float]) -> str:
    """What a validation found, for the terminal."""
    loss = f"loss {row['train_loss']:.3f}, " if "train_loss" in row else ""
    return (
        f"  step {row['step']}: {loss}val {found['loss']:.3f}, cosine {found['same']:.3f} of one identity, "
        f"{found['other']:.3f} of two, nearest right {found['retrieval']:.1%}, equal error {found['error']:.1%}"
    )


def write_heads(training: HeadTraining) -> None:
    """Write the last head and the best."""
    trainer, config = training.trainer, training.config
    about = {"steps": config.steps, "pictures_sha256": training.data["pictures"], "config": shareable(config)}
    best = deepcopy(training.head)
    best.load_state_dict(trainer.extra["best"])
    figures_of = {"last": trainer.progress.last | {"step": trainer.step}, "best": trainer.progress.best}
    for name, head in (("last", training.head), ("best", best)):
        save_head(training.file(name), head, made_for(training.backbone, figures_of[name], about))
