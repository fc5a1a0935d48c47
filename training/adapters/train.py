"""Train both adapters together, on latent pairs.

    python -m training train --latent-root latents --out-h2k h2k.safetensors --out-k2h k2h.safetensors

A first pass over the pairs gathers each channel's statistics and fits affine 3x3x3 maps in closed form. The default
network starts at these maps, and the saved adapters are never worse than them on the validation pairs. The loss, the
optimisers and the rest of the recipe are in `training.adapters.recipe`.
`--network published --epochs 250 --batch-size 512 --lr 1e-4 --ema 0` is the recipe of the published adapters.
The state is saved after each epoch, once a minute and on Ctrl-C. The same command then continues, with any number of
processes (`torchrun --nproc_per_node 8 -m training train …`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...adapters.adapter import LatentAdapter
from ...adapters.files import save_adapter
from ...adapters.shuffle import on_one_grid
from ...kvae.paths import write_bytes
from ..data.dataset import batches
from ..data.manifests import read_manifest, weights_of, without_signature
from ..directions import DIRECTIONS
from ..errors import UserError
from ..evaluate.curves import curves_png
from ..evaluate.latents import latent_metrics
from ..evaluate.report import write_report
from ..options import write_config
from ..runtime.ahead import ahead
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import add_to_log, keep_rows, read_log
from ..runtime.places import shareable
from ..runtime.saves import Saves
from ..runtime.stages import hidden, tell
from ..runtime.trainer import copied, state_errors
from .closed_form import affine_adapters
from .config import TrainConfig
from .recipe import Recipe, recipe_of
from .setup import Progress, Training, set_up

__all__ = ["TrainConfig", "run"]  # what the command line looks for

BATCHES_AHEAD = 4

Batch = tuple[int, list[tuple[Tensor, Tensor, Tensor]]]  # clips in all processes; the parts of this process's share


def run(config: TrainConfig, recipe: Recipe | None = None) -> int:
    """Train, or resume an unfinished training; return 0.

    Args:
        recipe: replaces the network's own recipe, see `recipe_of`.

    Raises:
        UserError: see `set_up`, `resume_or_start` and `train_epoch`.
        KeyboardInterrupt: Ctrl-C came; the state is saved.
    """
    started = time.time()
    training = set_up(config, recipe or recipe_of(config.network))
    resume_or_start(training)
    with BetweenSteps() as interrupts:
        while training.trainer.progress.epoch < config.epochs:
            train_epoch(training, interrupts)
            validate(training)
            save(training)
    if training.processes.main:
        adapters = write_adapters(training, time.time() - started)
        report(training, adapters)
        training.files.state.unlink(missing_ok=True)
    return 0


def resume_or_start(training: Training) -> None:
    """Restore the state of an unfinished training; if there is none, validate the networks as they start.

    Raises:
        UserError: the state is damaged, is of other settings or pairs, or is not seen by all processes.
    """
    config, files, processes, trainer = training.config, training.files, training.processes, training.trainer
    resumed = trainer.resume(files.state, config, training.pairs.identity)
    with state_errors(files.state):
        trainer.progress.check(trainer.step, training.steps_per_epoch)
    if len(set(processes.gather(resumed))) > 1:
        raise UserError(f"{files.state}: some of the processes see it, others do not")
    processes.wait()  # no process may find a state that another one saves from here on
    if processes.main:
        write_config(files.folder / "train.json", "train", config)
        keep_rows(files.log, trainer.progress.rows)
    if resumed:
        processes.say(f"Going on from step {trainer.step}, saved in {files.state}")
    else:
        processes.from_first(list(trainer.tensors().values()))
        validate(training)
        processes.say(f"Training on {len(training.pairs.train)} latent pairs, validating on {len(training.pairs.val)}")


def train_epoch(training: Training, interrupts: BetweenSteps) -> None:
    """Take the steps of the running epoch that are not done yet, and save once a minute.

    Raises:
        KeyboardInterrupt: Ctrl-C came in one of the processes; the state is saved.
        UserError: the errors are no longer finite.
    """
    processes, trainer, steps = training.processes, training.trainer, training.steps_per_epoch
    epoch = trainer.progress.epoch
    done = trainer.step - epoch * steps
    label, unseen = f"epoch {epoch + 1}/{training.config.epochs}", hidden(processes.main)
    stream = ahead([batches_of_epoch(training, done)], 1, BATCHES_AHEAD)
    started, waited, saves = time.perf_counter(), 0.0, Saves(lambda: save(training))
    with closing(stream), tqdm(initial=done, total=steps, desc=label, leave=False, disable=unseen) as bar:
        for _ in range(done, steps):
            waiting_since = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - waiting_since
            interrupted = train_step(training, batch, interrupts)
            bar.update()
            tell(trainer.step / trainer.schedule.total_steps)
            saves.after(interrupted)
    close_epoch(training, {"seconds": time.perf_counter() - started, "waited": waited})


def batches_of_epoch(training: Training, start: int) -> Iterator[Batch]:
    """The batches of the running epoch from number `start` on, with crops as `Pairs.crops` returns them.

    A part is what goes through the networks at once: the share of one process, divided for gradient accumulation.
    """
    config, processes, pairs = training.config, training.processes, training.pairs.train
    epoch = training.trainer.progress.epoch
    for numbers in batches(training.groups, config.batch_size, config.seed, epoch, start):
        mine = numbers[processes.rank :: processes.count]
        parts = [part for part in np.array_split(mine, processes.accumulation) if len(part)]
        crops = [pairs.crops(part, training.radius, config.seed, epoch, processes.device) for part in parts]
        yield len(numbers), crops


def train_step(training: Training, batch: Batch, interrupts: BetweenSteps) -> bool:
    """Take one step of both adapters, the same in all processes; return whether Ctrl-C came in any of them."""
    processes, trainer = training.processes, training.trainer
    clips, parts = batch
    sums = torch.zeros(3, device=processes.device)  # squared errors of both adapters, interrupted processes
    for z_h, z_k, weight in parts:
        with processes.autocast():
            errors = training.recipe.loss(trainer.models, z_h, z_k, weight)
        (torch.stack(list(errors.values())).sum() * len(z_h) / clips).backward()
        sums[:2] += torch.stack([errors[name] for name in DIRECTIONS]).detach() * len(z_h)
    sums[2] = interrupts.noted
    h2k, k2h, stop = processes.add_gradients(trainer.parameters, sums).tolist()
    trainer.update()
    before = trainer.progress.sums
    trainer.progress.sums = (before[0] + h2k, before[1] + k2h, before[2] + clips)
    return stop > 0


def close_epoch(training: Training, times: dict[str, float]) -> None:
    """Print and log the mean errors of an epoch.

    Raises:
        UserError: the errors are not finite, and further steps would not make them so.
    """
    processes, trainer, progress = training.processes, training.trainer, training.trainer.progress
    h2k, k2h, clips = progress.sums
    if not math.isfinite(h2k + k2h):
        if processes.main:
            training.files.state.unlink(missing_ok=True)
        epoch = progress.epoch + 1
        raise UserError(f"the error is {h2k / clips} H→K and {k2h / clips} K→H in epoch {epoch}: lower --lr")
    progress.epoch, progress.sums = progress.epoch + 1, Progress().sums
    label = f"Epoch {progress.epoch}/{training.config.epochs}"
    processes.say(f"  {label} - H→K MSE: {h2k / clips:.6f} | K→H MSE: {k2h / clips:.6f}")
    log(training, {"step": trainer.step, "train_h2k": h2k / clips, "train_k2h": k2h / clips} | times)


@torch.inference_mode()
def validate(training: Training) -> None:
    """Log the validation MSE of the averaged weights, and keep the best weights of each direction."""
    val, processes, trainer = training.pairs.val, training.processes, training.trainer
    row: dict[str, float] = {"step": trainer.step, "epoch": trainer.progress.epoch}
    with trainer.averaged():
        for name, network in trainer.models.items():
            errors = [torch.zeros((), device=processes.device)]  # they stay there until the last one is computed
            for i in range(processes.rank, len(val), processes.count):
                source, target = DIRECTIONS[name].ordered(*on_one_grid(*val.batch([i], processes.device)))
                errors.append(F.mse_loss(network(source), target))
            error = torch.stack(errors).cpu().double().sum()
            mse = row[f"val_{name}"] = processes.add(error).item() / len(val)
            if mse < trainer.progress.best_mse[name]:
                trainer.progress.best_mse[name] = mse
                trainer.extra[f"best.{name}"] = copied(trainer.averages[name])
    log(training, row)


def log(training: Training, row: dict[str, float]) -> None:
    """Append a row to the log."""
    training.trainer.progress.rows += 1
    if training.processes.main:
        add_to_log(training.files.log, row)


def save(training: Training) -> None:
    """Write the state of the training."""
    if training.processes.main:
        training.trainer.save(training.files.state, training.config, training.pairs.identity)


def write_adapters(training: Training, seconds: float) -> dict[str, LatentAdapter]:
    """Write the best weights of each direction to its adapter file, with the data and settings of the training.

    Args:
        seconds: since this process started.
    """
    trainer, pairs = training.trainer, training.pairs
    manifest = read_manifest(training.config.latent_root)
    how = {
        "pairs": len(pairs.train),
        "pairs_sha256": pairs.train.digest(),
        "steps": trainer.step,
        "seconds": round(seconds),
        "config": shareable(training.config),
        "extraction": {key: without_signature(each) for key, each in manifest.items()},
    }
    adapters = {}
    for name, direction in DIRECTIONS.items():
        network, mse, path = trainer.models[name], trainer.progress.best_mse[name], training.files.adapters[name]
        network.load_state_dict(trainer.extra[f"best.{name}"])
        metrics = {
            "val_mse": mse,
            "val_mse_share_of_variance": mse / training.fits[name].target_variance(),
            "val_pairs": len(pairs.val),
        }
        source, target = direction.ordered(*pairs.spaces)
        adapters[name] = LatentAdapter(network, source, target, how, metrics, weights_of(manifest))
        save_adapter(path, adapters[name])
        print(f"Saved {direction.label} adapter to: {path} (validation MSE {mse:.6f})")
    return adapters


def report(training: Training, adapters: dict[str, LatentAdapter]) -> None:
    """Write the report: latent errors on the validation pairs, next to the closed form. `evaluate` adds pixels."""
    files = training.files
    try:
        found = affine_adapters(training.fits, training.pairs.spaces)
        maps = {name: each.to(training.config.device) for name, each in found.items()}
    except ValueError:  # too few positions for the closed form; other networks need none
        maps = {}
    affine = (lambda i, name: maps[name]) if maps else None
    metrics = latent_metrics(training.pairs.val, adapters["h2k"], adapters["k2h"], affine)
    write_report(files.folder, files.adapters, {"latent": metrics}, files.log, {})
    write_bytes(files.folder / "train.png", curves_png(read_log(files.log)))
