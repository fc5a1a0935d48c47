"""Train a LoRA of HunyuanVideo 1.5's image-to-video network on pictures alone: no video is needed.

    python -m training vfl-train --base hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v --data-root dataset \\
        --cache-root cache --head head/head.safetensors --backbone dinov3-vitb16 --output-root ash

Two losses: the network with the LoRA must move as the network without it does (distillation), and the frames of its
estimate of the clip must show the character of the picture (the identity loss). `--plan` prints what that holds in
memory; a training that cannot fit is refused before anything is loaded.
Each validation says both, and writes the LoRA in four formats to OUTPUT/step-N. The state is saved at each validation,
once a minute and on Ctrl-C, between two steps. The same command then continues, with any number of processes that
divides --batch (`torchrun --nproc_per_node 8 -m training vfl-train --batch 8 …`).
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing

from tqdm import tqdm

from ...kvae.foreign import json_text
from ..errors import UserError, printable
from ..options import write_config
from ..runtime.ahead import in_order
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import add_to_log, keep_rows
from ..runtime.places import shareable
from ..runtime.processes import Processes
from ..runtime.saves import Saves
from ..runtime.trainer import state_errors
from .lora import lora_of
from .lora_files import write_lora
from .plan import free_bytes
from .samples import Shown
from .train_config import VflTrainConfig, check_config
from .train_plan import planned
from .train_report import write_report
from .train_step import Told, close_row, train_step
from .training import LoraTraining, resolved, set_up
from .validate import ValSample, line, validate

__all__ = ["VflTrainConfig", "run"]  # what the command line looks for


def run(config: VflTrainConfig) -> int:
    """Train, or resume an unfinished training; return 0, or 1 if some pictures could not be read.

    Raises:
        UserError: see `check_config`, `resolved`, `planned`, `set_up`, `resume_or_start` and `train_step`.
        KeyboardInterrupt: Ctrl-C came; the state is saved.
    """
    check_config(config)
    processes = Processes(config.device)
    config = resolved(config, processes)
    plan = planned(config, processes.count, processes.count if config.shard else 1)
    if config.plan:
        processes.say(plan.table(processes.device))
        return 0
    plan.check(free_bytes(processes.device))
    training = set_up(config, processes)
    with BetweenSteps() as interrupts:
        samples = val_samples(training)
        resume_or_start(training, samples)
        while training.trainer.progress.validated < config.steps:
            train_round(training, interrupts)
            close_round(training, samples)
            save(training)
    skipped = sorted(set().union(*training.processes.gather(training.skipped)))
    if training.processes.main:
        for each in skipped:
            print(printable(f"skipped: {each}"), file=sys.stderr)
        write_report(training)
        training.file("state").unlink(missing_ok=True)
    return 1 if skipped else 0


def val_samples(training: LoraTraining) -> list[ValSample]:
    """The clips that every validation starts."""
    config, device = training.config, training.processes.device
    shown = [training.val(k) for k in range(config.val_samples)]
    training.skipped.update(*(each.skipped for each in shown))
    return [
        ValSample(each.given(device, training.dtype), each.noise(config.seed, config.frames), each.anchor_B3HW(device))
        for each in shown
    ]


def resume_or_start(training: LoraTraining, samples: list[ValSample]) -> None:
    """Restore the state of an unfinished training; if there is none, validate the LoRA as it starts.

    Raises:
        UserError: the state is damaged, is of other settings or data, or is not seen by all processes.
    """
    config, processes, trainer, state = training.config, training.processes, training.trainer, training.file("state")
    resumed = trainer.resume(state, training.lasting, training.data)
    if resumed:
        with state_errors(state):
            trainer.progress.check(trainer.step, config.val_every)
    if len(set(processes.gather(resumed))) > 1:
        raise UserError(f"{state}: some of the processes see it, others do not")
    processes.wait()  # no process may find a state that another one saves from here on
    if processes.main:
        write_config(training.file("settings"), "vfl-train", config)
        keep_rows(training.file("log"), trainer.progress.rows)
    if resumed:
        processes.say(f"Going on from step {trainer.step}, saved in {state}")
    else:
        processes.say(about(training))
        close_round(training, samples)


def about(training: LoraTraining) -> str:
    """What is trained, and on what, for the terminal."""
    recipe, index, trainer = training.recipe, training.train.index, training.trainer
    low, high = (recipe.sigma[i].item() for i in recipe.band)
    weights = sum(parameter.numel() for parameter in trainer.parameters)
    return (
        f"Training {len(trainer.parameters) // 2} layers, {weights:,} weights, on {int(index.counts.sum()):,} pictures "
        f"of {len(index.identities):,} identities. The identity loss looks at steps {recipe.band[0]} to "
        f"{recipe.band[1]} of {len(recipe.sigma) - 1}, at noise levels {low:.3f} to {high:.3f}"
    )


def train_round(training: LoraTraining, interrupts: BetweenSteps) -> None:
    """Take the steps until the next validation that are not done yet, and save once a minute.

    Raises:
        KeyboardInterrupt: Ctrl-C came in one of the processes; the state is saved.
    """
    config, trainer, processes = training.config, training.trainer, training.processes
    end = min(trainer.progress.validated + config.val_every, config.steps)
    saves, told = Saves(lambda: save(training)), Told()
    hidden = None if processes.main else True
    how = {"initial": trainer.step, "total": config.steps, "leave": False, "disable": hidden}
    with closing(samples_from(training, trainer.step, end)) as stream, tqdm(desc="train", unit="step", **how) as bar:
        for shown in stream:
            interrupted = train_step(training, shown, interrupts)
            bar.update()
            close_row(training, told)
            saves.after(interrupted)


def samples_from(training: LoraTraining, step: int, end: int) -> Generator[list[Shown], None, None]:
    """Yield this process's samples of each step."""
    config, processes = training.config, training.processes

    def read(step: int) -> list[Shown]:
        mine = range(processes.rank, config.batch, processes.count)
        return [training.train(step * config.batch + i) for i in mine]

    return in_order(read, range(step, end))


def close_round(training: LoraTraining, samples: list[ValSample]) -> None:
    """Validate, log and print what was found, and write the LoRA."""
    trainer, processes = training.trainer, training.processes
    processes.from_first(list(trainer.tensors().values()))  # whose LoRA is saved; others may round differently
    found = validate(training, samples)
    progress = trainer.progress
    progress.validated, progress.last, progress.first = trainer.step, found, progress.first or found
    progress.rows += 1
    if processes.main:
        row = {"step": trainer.step} | {f"val_{key}": value for key, value in found.items()}
        add_to_log(training.file("log"), row)
        if trainer.step:
            write_files(training)
    processes.say(line(trainer.step, found))


def write_files(training: LoraTraining) -> None:
    """Write the LoRA in all formats, named after the folder of the training."""
    name, step = training.folder.resolve().name, training.trainer.step
    facts = {"settings": shareable(training.config), "step": step, "validation": training.trainer.progress.last}
    texts = {"vfl-train": json_text(facts)}
    write_lora(training.folder / f"step-{step}", f"{name}-{step}", lora_of(training.transformer), about=texts)


def save(training: LoraTraining) -> None:
    """Write the state of the training."""
    if training.processes.main:
        training.trainer.save(training.file("state"), training.lasting, training.data)
