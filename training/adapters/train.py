"""Both adapters, trained together on latent pairs.

    python -m training train --latent-root latents --out-h2k h2k.safetensors --out-k2h k2h.safetensors

`training.adapters.recipe` says by what loss. A first pass over the pairs takes each channel's statistics and fits
affine 3x3x3 maps in closed form; the default network starts there, and what is saved is never worse on the validation
pairs.
`--network published --epochs 250 --batch-size 512 --lr 1e-4` is the recipe of the published adapters.
Ctrl-C or a crash costs at most the steps since the last save: the same command goes on from there, with any number of
processes (`torchrun --nproc_per_node 8 -m training train …`). A step is of --batch-size clips in all, however they are
shared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...adapters.files import LatentAdapter, save_adapter
from ...adapters.networks import Affine, Network, PointwiseNet, Residual, build_network
from ...kvae.paths import write_bytes
from ..data.dataset import Groups, batches
from ..data.manifests import read_manifest, read_spaces, weights_of, without_signature
from ..errors import UserError
from ..evaluate.evaluate import latent_figures
from ..evaluate.report import curves_png, write_report
from ..options import write_config
from ..runtime.ahead import ahead
from ..runtime.checkpoint import State, load_state, open_state, save_state
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import add_to_log, keep_rows, read_log
from ..runtime.places import shareable
from ..runtime.processes import Processes
from .closed_form import fit_both_ways
from .job import (
    DIRECTIONS,
    Job,
    TrainConfig,
    check_channels,
    check_config,
    check_variance,
    resume_file,
    split,
    what_pairs,
)
from .recipe import DEFAULT, PUBLISHED, Recipe
from .ridge import Ridge

__all__ = ["DIRECTIONS", "TrainConfig", "run"]

SAVE_SECONDS = 60
WARMUP_STEPS = 20
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """What a step takes: how many clips in all processes, and this one's, in the parts that run one after another."""

    clips: int
    parts: list[tuple[Tensor, Tensor, Tensor]]  # z_h, z_k, weight, as Pairs.crops gives them


def run(config: TrainConfig, recipe: Recipe | None = None) -> int:
    """Train, or go on training; by the default recipe, or the published network by the published one. Returns 0."""
    started = time.time()
    job = _prepare(config, recipe or (PUBLISHED if config.network == "published" else DEFAULT))
    state = _start(job)
    _resume_or_begin(state, job)
    _train(state, job)
    if job.processes.main:
        adapters = _write_adapters(state, job, time.time() - started)
        _report(adapters, job)
        job.resume_file.unlink(missing_ok=True)
    return 0


def _prepare(config: TrainConfig, recipe: Recipe) -> Job:
    check_config(config)
    processes = Processes(config.device)
    config = replace(config, device=str(processes.device))
    train, val = split(config)
    spaces = read_spaces(config.latent_root)
    check_channels(config, train, val, spaces)
    pairs = what_pairs(config, train, val)
    if any(theirs != pairs for theirs in processes.gather(pairs)):
        raise UserError(f"{config.latent_root}: the processes do not see the same pairs")
    open_state(resume_file(config), config, pairs)  # refused, if at all, before the closed form is computed
    fits = fit_both_ways(train, config.device, processes=processes)
    check_variance(config, fits)
    return Job(config, recipe, processes, train, val, spaces, fits, pairs)


def _resume_or_begin(state: State, job: Job) -> None:
    """Fill the state from what was saved, where something was; else judge the networks as they start."""
    steps = _steps(job, job.train.groups(_sight(state)))
    resumed = load_state(job.resume_file, state, job.config, job.pairs, steps)
    if len(set(job.processes.gather(resumed))) > 1:
        raise UserError(f"{job.resume_file}: some of the processes see it, others do not")
    job.processes.wait()  # none is to find the state that another saves
    if job.processes.main:
        write_config(job.folder / "train.json", "train", job.config)
        keep_rows(job.log_file, state.rows)
    if resumed:
        job.processes.say(f"Going on from step {state.step}, saved in {job.resume_file}")
    else:
        job.processes.from_first(list(state.tensors().values()))
        _validate(state, job)
        job.processes.say(f"Training on {len(job.train)} latent pairs, validating on {len(job.val)}")


def _train(state: State, job: Job) -> None:
    """The epochs that are not behind us, each validated and saved."""
    groups = job.train.groups(_sight(state))
    with BetweenSteps() as interrupts:
        while state.epoch < job.config.epochs:
            started = time.perf_counter()
            waited = _epoch(state, job, groups, interrupts)
            _close_epoch(state, job, {"seconds": time.perf_counter() - started, "waited": waited})
            _validate(state, job)
            if job.processes.main:
                _save(state, job)


def _epoch(state: State, job: Job, groups: Groups, interrupts: BetweenSteps) -> float:
    """The steps of an epoch that are not behind us, saved now and then; returns the seconds that it waited for data.

    Raises:
        KeyboardInterrupt: Ctrl-C came in one of the processes; the state is saved.
    """
    config, processes = job.config, job.processes
    steps = _steps(job, groups)
    done = state.step - state.epoch * steps
    label, hidden = f"epoch {state.epoch + 1}/{config.epochs}", None if processes.main else True
    stream = ahead([_batches(job, groups, _sight(state), state.epoch, done)], 1, BATCHES_AHEAD)
    waited, last_save = 0.0, time.time()
    with closing(stream), tqdm(initial=done, total=steps, desc=label, leave=False, disable=hidden) as bar:
        for _ in range(done, steps):
            waiting_since = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - waiting_since
            interrupted = _step(state, batch, job, steps * config.epochs, interrupts)
            bar.update()
            if processes.main and (interrupted or time.time() - last_save > SAVE_SECONDS):
                _save(state, job)
                last_save = time.time()
            if interrupted:
                raise KeyboardInterrupt
    return waited


def _steps(job: Job, groups: Groups) -> int:
    """Of an epoch."""
    return sum(math.ceil(len(group) / job.config.batch_size) for group in groups.values())


def _close_epoch(state: State, job: Job, times: dict[str, float]) -> None:
    """Say and log what the epoch's steps gave.

    Raises:
        UserError: the errors are no longer numbers, and never will be again.
    """
    h2k, k2h, clips = state.sums
    if not math.isfinite(h2k + k2h):
        if job.processes.main:
            job.resume_file.unlink(missing_ok=True)
        raise UserError(f"the error is {h2k / clips} H→K and {k2h / clips} K→H in epoch {state.epoch + 1}: lower --lr")
    state.epoch, state.sums = state.epoch + 1, (0.0, 0.0, 0)
    label = f"Epoch {state.epoch}/{job.config.epochs}"
    job.processes.say(f"  {label} - H→K MSE: {h2k / clips:.6f} | K→H MSE: {k2h / clips:.6f}")
    _log(state, job, {"step": state.step, "train_h2k": h2k / clips, "train_k2h": k2h / clips} | times)


def _sight(state: State) -> int | None:
    """Radius of the crops to train on; None where a network must see whole clips."""
    if any(isinstance(network, PointwiseNet) for network in state.networks.values()):
        return None
    return max(network.radius for network in state.networks.values())


def _start(job: Job) -> State:
    """The state before the first step."""
    config, fits = job.config, job.fits
    torch.manual_seed(config.seed)
    networks = {"h2k": _network(job, fits["h2k"], fits["k2h"]), "k2h": _network(job, fits["k2h"], fits["h2k"])}
    averages = {name: _copy(network) for name, network in networks.items()}
    best = {name: _copy(network) for name, network in networks.items()}
    optimisers = job.recipe.optimisers(networks, config.lr, config.weight_decay)
    return State(networks, averages, best, dict.fromkeys(DIRECTIONS, math.inf), optimisers)


def _network(job: Job, fit: Ridge, back: Ridge) -> Network:
    """A network of one direction on the device: where it can, it starts at the closed form.

    Args:
        back: the fit of the other direction, which knows the source's statistics.

    Raises:
        UserError: there are too few pairs for the closed form.
    """
    config, channels = job.config, {"in_channels": fit.in_channels, "out_channels": fit.out_channels}
    network = build_network(config.network, **channels, **job.recipe.network)
    if isinstance(network, Affine | Residual) and job.recipe.closed_form:
        try:
            network.affine.load_state_dict(fit.solve().affine.state_dict())
        except ValueError as error:
            raise UserError(f"{config.latent_root}: {error}") from None
    if isinstance(network, Residual):
        mean, std = back.target_statistics()
        network.source_mean.copy_(mean)
        network.source_std.copy_(std)
        network.target_std.copy_(fit.target_statistics()[1])
    return network.to(config.device)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def _batches(job: Job, groups: Groups, radius: int | None, epoch: int, start: int) -> Iterator[Batch]:
    """The batches of an epoch from its batch `start` on: this process' share of each, on the device."""
    config, processes = job.config, job.processes
    for numbers in batches(groups, config.batch_size, config.seed, epoch, start):
        mine = numbers[processes.rank :: processes.count]
        parts = [part for part in np.array_split(mine, processes.accumulation) if len(part)]
        crops = [job.train.crops(part, radius, config.seed, epoch, processes.device) for part in parts]
        yield Batch(len(numbers), crops)


def _step(state: State, batch: Batch, job: Job, total: int, interrupts: BetweenSteps) -> bool:
    """One of `total` steps on both adapters, the same in all processes; whether one of those was interrupted."""
    config, processes = job.config, job.processes
    for optimiser in state.optimisers:
        optimiser.zero_grad()
        if config.network != "published":
            for group in optimiser.param_groups:
                group["lr"] = config.lr * min(1, (state.step + 1) / WARMUP_STEPS) * (1 - state.step / total)
    sums = torch.zeros(3, device=processes.device)
    for z_h, z_k, weight in batch.parts:
        with processes.autocast():
            errors = job.recipe.loss(state.networks, z_h, z_k, weight)
        (torch.stack(list(errors.values())).sum() * len(z_h) / batch.clips).backward()
        sums[:2] += torch.stack([errors["h2k"], errors["k2h"]]).detach() * len(z_h)
    sums[2] = interrupts.noted
    sum_h, sum_k, stop = _over_processes(state, sums, processes).tolist()
    for optimiser in state.optimisers:
        optimiser.step()
    state.step += 1
    decay = min(config.ema, state.step / (state.step + 10))
    for name, network in state.networks.items():
        for key, tensor in network.state_dict().items():
            state.averages[name][key].lerp_(tensor, 1 - decay)
    state.sums = (state.sums[0] + sum_h, state.sums[1] + sum_k, state.sums[2] + batch.clips)
    return stop > 0


def _over_processes(state: State, sums: Tensor, processes: Processes) -> Tensor:
    """Gradients, and these sums, added up over all processes. The adapters are small: it is one message."""
    if processes.count == 1:
        return sums
    parameters = [p for name in DIRECTIONS for p in state.networks[name].parameters()]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    together = processes.add(torch.cat([*(gradient.flatten() for gradient in gradients), sums]))
    for p, part in zip(parameters, together.split([p.numel() for p in parameters] + [len(sums)]), strict=False):
        p.grad = part.view_as(p).clone()
    return together[-len(sums) :]


@torch.inference_mode()
def _validate(state: State, job: Job) -> None:
    """Validation MSE of the averaged weights; the best of each direction is kept."""
    val, processes = job.val, job.processes
    row: dict[str, float] = {"step": state.step, "epoch": state.epoch}
    for name, network in state.networks.items():
        live = _copy(network)
        network.load_state_dict(state.averages[name])
        error = torch.zeros((), dtype=torch.float64)
        for i in range(processes.rank, len(val), processes.count):
            z_h, z_k = val.batch([i], processes.device)
            source, target = (z_h, z_k) if name == "h2k" else (z_k, z_h)
            error += F.mse_loss(network(source), target).item()
        network.load_state_dict(live)
        row[f"val_{name}"] = processes.add(error).item() / len(val)
        if row[f"val_{name}"] < state.best_mse[name]:
            state.best_mse[name] = row[f"val_{name}"]
            state.best[name] = {key: tensor.clone() for key, tensor in state.averages[name].items()}
    _log(state, job, row)


def _log(state: State, job: Job, row: dict[str, float]) -> None:
    state.rows += 1
    if job.processes.main:
        add_to_log(job.log_file, row)


def _save(state: State, job: Job) -> None:
    save_state(job.resume_file, state, job.config, job.pairs)


def _write_adapters(state: State, job: Job, seconds: float) -> dict[str, LatentAdapter]:
    """The best weights of each direction, in files that say what they are."""
    manifest = read_manifest(job.config.latent_root)
    training = {
        "pairs": len(job.train),
        "pairs_sha256": job.train.digest(),
        "steps": state.step,
        "seconds": round(seconds),
        "config": shareable(job.config),
        "extraction": {key: without_signature(each) for key, each in manifest.items()},
    }
    adapters = {}
    for name, label in (("h2k", "Hunyuan→KVAE"), ("k2h", "KVAE→Hunyuan")):
        network, mse = state.networks[name], state.best_mse[name]
        network.load_state_dict(state.best[name])
        metrics = {
            "val_mse": mse,
            "val_mse_share_of_variance": mse / job.fits[name].target_variance(),
            "val_pairs": len(job.val),
        }
        source, target = job.spaces if name == "h2k" else job.spaces[::-1]
        adapters[name] = LatentAdapter(network, source, target, training, metrics, weights_of(manifest))
        save_adapter(job.adapter_files[name], adapters[name])
        print(f"Saved {label} adapter to: {job.adapter_files[name]} (validation MSE {mse:.6f})")
    return adapters


def _report(adapters: dict[str, LatentAdapter], job: Job) -> None:
    """What the latents of the validation pairs say of the adapters, beside the closed form; `evaluate` adds pixels."""
    try:
        maps = {name: fit.solve().to(job.config.device) for name, fit in job.fits.items()}
    except ValueError:  # too few positions for it, which the published network does not mind
        maps = {}
    affine = (lambda i, name: maps[name]) if maps else None
    figures = latent_figures(job.val, adapters["h2k"], adapters["k2h"], affine)
    write_report(job.folder, job.adapter_files, {"latent": figures}, job.log_file, {})
    write_bytes(job.folder / "train.png", curves_png(read_log(job.log_file)))
