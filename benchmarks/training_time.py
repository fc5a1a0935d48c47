"""Seconds to the published recipe's final latent error, on the same pairs, in one run.

    python -m benchmarks.training_time --latent-root latents/train --val-latent-root latents/val
    python -m benchmarks.training_time … --epochs 25        # a tenth of the recipe, and a tenth of the ratio

The published recipe trains from random weights: 1x1x1 networks, AdamW at 1e-4, batches of 512, 250 epochs. The other
side is what `train` starts from: affine 3x3x3 maps in closed form. Both read the same pairs, and both are judged by
their mean squared error on the validation pairs, outside of the time that is counted. Seconds are those of the CPU,
with one thread, so that other work on the machine does not count. The last line is where the time of a training of the
default network went: its epochs' seconds on the clock, and how many of them it waited for data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from kvae_comfyui.training.adapters import setup, train
from kvae_comfyui.training.adapters.closed_form import fit_both_ways
from kvae_comfyui.training.data.dataset import Pairs, open_pairs
from kvae_comfyui.training.directions import DIRECTIONS
from kvae_comfyui.training.runtime.log import read_log

CPU = torch.device("cpu")
PUBLISHED = {"network": "published", "batch_size": 512, "lr": 1e-4, "ema": 0.0}


def main() -> None:
    """Print both sides, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-root", required=True)
    parser.add_argument("--val-latent-root", required=True)
    parser.add_argument("--epochs", type=int, default=250, help="of the published recipe (default 250)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    roots = {"latent_root": options.latent_root, "val_latent_root": options.val_latent_root, "device": "cpu"}
    val = open_pairs(options.val_latent_root)

    start = time.process_time()
    fits = fit_both_ways(open_pairs(options.latent_root), "cpu")
    maps = {name: fit.solve() for name, fit in fits.items()}
    closed_form = time.process_time() - start
    ours = {name: error(network, name, val) for name, network in maps.items()}
    print(f"closed form: {closed_form:.1f} s, {shown(ours)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        with beside((setup, "fit_both_ways"), (train, "validate"), (train, "report")) as uncounted:
            start = time.process_time()
            rows = run(train.TrainConfig(**roots, **PUBLISHED, epochs=options.epochs, **outputs(folder)), folder)  # type: ignore[arg-type]
            published = time.process_time() - start - sum(uncounted)
        theirs = {name: min(row[f"val_{name}"] for row in rows if f"val_{name}" in row) for name in DIRECTIONS}
        print(f"published recipe, {options.epochs} epochs: {published:.1f} s, {shown(theirs)}", flush=True)
        reached = all(ours[name] <= theirs[name] for name in ours)
        print(f"ratio 1/{published / closed_form:.0f}" if reached else "the closed form has not reached that error")

        rows = run(train.TrainConfig(**roots, epochs=2, **outputs(folder)), folder)  # type: ignore[arg-type]
        seconds, waited = (sum(row.get(key, 0) for row in rows) for key in ("seconds", "waited"))
        print(f"default network, 2 epochs: {seconds:.1f} s, of which {waited:.2f} s ({waited / seconds:.1%}) for data")


@contextlib.contextmanager
def beside(*functions: tuple[ModuleType, str]) -> Iterator[list[float]]:
    """The CPU seconds spent in these functions of these modules."""
    spent: list[float] = []

    def timed(function: Callable) -> Callable:
        def call(*args: object) -> object:
            start = time.process_time()
            try:
                return function(*args)
            finally:
                spent.append(time.process_time() - start)

        return call

    real = [(module, name, getattr(module, name)) for module, name in functions]
    for module, name, function in real:
        setattr(module, name, timed(function))
    try:
        yield spent
    finally:
        for module, name, function in real:
            setattr(module, name, function)


def outputs(folder: str) -> dict[str, str]:
    return {f"out_{name}": str(Path(folder, f"{name}.safetensors")) for name in DIRECTIONS}


def run(config: train.TrainConfig, folder: str) -> list[dict]:
    """The rows of the training's log."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(config)
    return read_log(Path(folder, "train.jsonl"))


@torch.inference_mode()
def error(network: torch.nn.Module, name: str, val: Pairs) -> float:
    """Mean squared error of a direction over the validation pairs."""
    errors = []
    for i in range(len(val)):
        z_h, z_k = val.batch([i], CPU)
        source, target = DIRECTIONS[name].ordered(z_h, z_k)
        errors.append(F.mse_loss(network(source), target).item())
    return sum(errors) / len(errors)


def shown(errors: dict[str, float]) -> str:
    return f"validation MSE H→K {errors['h2k']:.4f}, K→H {errors['k2h']:.4f}"


if __name__ == "__main__":
    main()
