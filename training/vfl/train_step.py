"""One optimiser step of the training of a LoRA, and the row of the log that some of them make.

# x_Bcthw scaled latents, z_Bcthw an estimate of the clip; k number of a sample
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import UserError
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import add_to_log
from .cache import EMPTY
from .conditions import flow, guided
from .gradients import GradientSum
from .look import Look
from .lora import fill_gradients
from .losses import Losses, identity_weight
from .path import Drawn, Teacher
from .samples import Shown
from .step import lora_step
from .training import LoraTraining
from .validate import DRIFT

LOG_EVERY = 10  # optimiser steps
SAY_SECONDS = 60


def train_step(training: LoraTraining, shown: Sequence[Shown], interrupts: BetweenSteps) -> bool:
    """Take one step, the same in all processes; return whether Ctrl-C came in any of them.

    Args:
        shown: this process's samples of the step.

    Raises:
        UserError: a loss is not finite, and further steps would not make it so.
    """
    config, processes, trainer = training.config, training.processes, training.trainer
    parameters = trainer.parameters
    gradients, looked = GradientSum(parameters), training.recipe.looks(trainer.step)
    # distillation, flow, identity, appearance; samples, those that were looked at; Ctrl-C
    numbers = torch.zeros(7, dtype=torch.float64)
    for each in shown:
        training.skipped.update(each.skipped)
        look = Look(training, each)
        losses = learn_from(training, each, look)
        numbers += torch.tensor([losses.distill, losses.flow, look.identity, look.appearance, 1, looked, 0])
        if config.batch > 1:
            gradients.take()
    numbers[-1] = interrupts.noted
    if config.batch > 1:
        numbers = gradients.give(processes, numbers).cpu()
    *sums, stop = numbers.tolist()
    if not math.isfinite(sum(sums)):
        if processes.main:
            training.file("state").unlink(missing_ok=True)
        raise UserError(f"the loss is {sum(sums)} in step {trainer.step}: lower --lr; --start-from goes on from a LoRA")
    fill_gradients(iter(parameters))
    norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
    trainer.update()
    before = trainer.progress.sums
    trainer.progress.sums = tuple(a + b for a, b in zip(before, (*sums, norm), strict=True))
    return stop > 0


def learn_from(training: LoraTraining, shown: Shown, look: Look) -> Losses:
    """Add the gradient of one sample."""
    config, recipe, transformer, step = training.config, training.recipe, training.transformer, training.trainer.step
    device = training.processes.device
    given = shown.given(device, training.dtype)
    teacher: Teacher | None = None
    if config.rollout_guidance > 1:
        empty = given.with_texts([training.train.files.text(EMPTY)])
        teacher = lambda x, i: guided(transformer, given, empty, x, recipe.sigma[i], config.rollout_guidance)  # noqa: E731
    return lora_step(
        transformer, lambda x, i: flow(transformer, given, x, recipe.sigma[i]),
        shown.noise(config.seed, config.frames).to(device), recipe, config.seed, shown.k, step,
        look, teacher, 1 / config.batch, partners(training, shown.k),
    )  # fmt: skip


def partners(training: LoraTraining, k: int) -> list[Drawn]:
    """The steps of the samples that the processes with the other parts of the base take meanwhile."""
    first = k - training.processes.rank
    others = range(first, first + training.shards)
    return [training.recipe.drawn(training.config.seed, each, training.trainer.step) for each in others if each != k]


class Told:
    """When a row was last printed: a terminal needs no more than one a minute."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.steps = 0


def close_row(training: LoraTraining, told: Told) -> None:
    """Log the means of the last steps, and print them once a minute."""
    trainer, progress, now = training.trainer, training.trainer.progress, time.monotonic()
    told.steps += 1
    if trainer.step % LOG_EVERY and trainer.step < training.config.steps:
        return
    distill, flow_square, identity, appearance, samples, looked, norms = progress.sums
    recipe, steps = training.recipe, samples / training.config.batch
    row = {
        "step": trainer.step, "distill": distill / samples, "drift": distill / flow_square,
        "weight": identity_weight(trainer.step, recipe.weight, recipe.schedule, recipe.warmup),
        "norm": norms / steps, "lr": trainer.schedule.rate(trainer.step - 1),
    }  # fmt: skip
    weighty = {"identity": training.config.identity_weight, "appearance": training.config.appearance_weight}
    found = {"identity": identity, "appearance": appearance}
    row |= {name: total / looked for name, total in found.items() if looked and weighty[name]}
    progress.sums, progress.rows = (0.0,) * len(progress.sums), progress.rows + 1
    if training.processes.main:
        add_to_log(training.file("log"), row)
    if now - told.last > SAY_SECONDS:
        told.last = now
        training.processes.say(said(row, (now - told.begun) / told.steps, training.config.steps - trainer.step))


def said(row: dict[str, float], seconds: float, left: int) -> str:
    """A row of the log, for the terminal."""
    hours = seconds * left / 3600
    units = ((48, 1 / 24, "days"), (1, 1, "hours"), (0, 60, "minutes"))
    remaining = next(f"{hours * factor:.1f} {unit}" for least, factor, unit in units if hours >= least)
    looks = "".join(f", {name} loss {row[name]:.3f}" for name in ("identity", "appearance") if name in row)
    high = " (high: lower --identity-weight)" if row["drift"] > DRIFT else ""
    return (
        f"  step {row['step']}: distillation {row['drift']:.3%} of the flow{high}{looks}; {seconds:.1f} s a step, "
        f"{remaining} left"
    )
