"""Train the identity head: a small network that turns DINOv3's features of a picture into who is in it.

    python -m training vfl-head --data-root dataset --backbone dinov3-vitb16 --output-root head

DINOv3 is frozen, so each process computes features of its share of a batch, and each trains the same head on all of
them, by supervised contrastive loss. head.safetensors is the head with the widest gap between the cosines of one
identity and of two, on the split val; head.last.safetensors is the last one. Noise in the pictures makes the head
ready for estimates of clips, which are never clean.
The state is saved at each validation, once a minute and on Ctrl-C. The same command then continues, with any number of
processes (`torchrun --nproc_per_node 8 -m training vfl-head …`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, printable
from ..options import write_config
from ..runtime.ahead import in_order
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import keep_rows
from ..runtime.saves import Saves
from ..runtime.trainer import state_errors
from .contrast import supcon
from .draws import Draws
from .head_report import write_report
from .head_setup import NEAREST, HeadTraining, VflHeadConfig, set_up
from .head_validation import validate
from .identity import Backbone

__all__ = ["VflHeadConfig", "run"]  # what the command line looks for

RECENT = 0.5  # weight of a batch in the mean embedding of an identity


def run(config: VflHeadConfig, backbone: Backbone | None = None) -> int:
    """Train, or resume an unfinished training; return 0, or 1 if some pictures could not be read.

    Args:
        backbone: replaces the one that the config names.

    Raises:
        UserError: see `set_up`, `resume_or_start` and `validate`.
        KeyboardInterrupt: Ctrl-C came; the state is saved.
    """
    training = set_up(config, backbone)
    with BetweenSteps() as interrupts:
        resume_or_start(training)
        while training.trainer.progress.validated < config.steps:
            train_round(training, interrupts)
            validate(training)
            save(training)
    skipped = sorted(set().union(*training.processes.gather(training.skipped)))
    if training.processes.main:
        for line in skipped:
            print(printable(f"skipped: {line}"), file=sys.stderr)
        write_report(training)
        training.file("state").unlink(missing_ok=True)
    return 1 if skipped else 0


def resume_or_start(training: HeadTraining) -> None:
    """Restore the state of an unfinished training; if there is none, validate the head as it starts.

    Raises:
        UserError: the state is damaged, is of other settings or pictures, or is not seen by all processes.
    """
    config, processes, trainer, state = training.config, training.processes, training.trainer, training.file("state")
    resumed = trainer.resume(state, config, training.data)
    if resumed:
        with state_errors(state):
            trainer.progress.check(trainer.step, config.val_every)
    if len(set(processes.gather(resumed))) > 1:
        raise UserError(f"{state}: some of the processes see it, others do not")
    processes.wait()  # no process may find a state that another one saves from here on
    if processes.main:
        write_config(training.file("settings"), "vfl-head", config)
        keep_rows(training.file("log"), trainer.progress.rows)
    if resumed:
        processes.say(f"Going on from step {trainer.step}, saved in {state}")
    else:
        for name, index in (("Training", training.train.index), ("Validating", training.val.index)):
            pictures, identities = int(index.counts.sum()), len(index.identities)
            processes.say(f"{name} on {pictures:,} pictures of {identities:,} identities")
        validate(training)


def train_round(training: HeadTraining, interrupts: BetweenSteps) -> None:
    """Take the steps until the next validation that are not done yet, and save once a minute.

    Raises:
        KeyboardInterrupt: Ctrl-C came in one of the processes; the state is saved.
    """
    config, trainer = training.config, training.trainer
    end = min(trainer.progress.validated + config.val_every, config.steps)
    saves = Saves(lambda: save(training))
    how = {"initial": trainer.step, "total": config.steps, "leave": False, "disable": training.hidden}
    with closing(batches_from(training, trainer.step, end)) as stream, tqdm(desc="train", unit="step", **how) as bar:
        for pictures in stream:
            interrupted = train_step(training, pictures, interrupts)
            bar.update()
            saves.after(interrupted)


def batches_from(training: HeadTraining, step: int, end: int) -> Generator[Tensor, None, None]:
    """Yield this process's share of each batch, float32 [n, 3, S, S]."""
    config, processes, views = training.config, training.processes, training.views
    share = slice(processes.rank, None, processes.count)

    def read(step: int) -> Tensor:
        samples = training.train.batch(config.seed, step, views.at(config.seed, step), share)
        training.skipped.update(line for sample in samples for line in sample.skipped)
        return torch.stack([sample.picture for sample in samples])

    return in_order(read, range(step, end))


def train_step(training: HeadTraining, pictures: Tensor, interrupts: BetweenSteps) -> bool:
    """Take one step, the same in all processes; return whether Ctrl-C came in any of them."""
    config, trainer, head = training.config, training.trainer, training.head
    x_ND, stop = features(training, pictures, interrupts.noted)
    torch.manual_seed(Draws(config.seed, "dropout", trainer.step).bits())
    head.train()
    f_NE = head(x_ND)
    places = torch.arange(config.identities, device=f_NE.device).repeat_interleave(config.pictures)
    loss = supcon(f_NE, places, config.temperature)
    loss.backward()
    if config.nearest:
        chosen = training.train.chosen(config.seed, trainer.step)
        means, running = f_NE.detach().unflatten(0, (-1, config.pictures)).mean(1), trainer.extra[NEAREST]["running"]
        running[chosen] = running[chosen].lerp(means, RECENT)
    trainer.update()
    trainer.progress.loss_sum += loss.item()
    return stop


@torch.no_grad()
def features(training: HeadTraining, pictures: Tensor, noted: bool) -> tuple[Tensor, bool]:
    """The features of the whole batch [P·K, D], and whether any process has noted Ctrl-C, in one message."""
    config, processes, backbone = training.config, training.processes, training.backbone
    shape = config.identities, config.pictures, backbone.width
    message = torch.zeros(math.prod(shape) + 1, device=processes.device)
    message[:-1].view(shape)[processes.rank :: processes.count] = backbone(pictures.to(processes.device)).view(
        -1, *shape[1:]
    )
    message[-1] = noted
    message = processes.add(message)
    return message[:-1].view(-1, backbone.width), message[-1].item() > 0


def save(training: HeadTraining) -> None:
    """Write the state of the training."""
    if training.processes.main:
        training.trainer.save(training.file("state"), training.config, training.data)
