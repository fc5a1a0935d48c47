"""Seconds to the published recipe's final latent error, on the same pairs, in one run.

    python -m benchmarks.training_time --latent-root latents/train --val-latent-root latents/val
    python -m benchmarks.training_time … --epochs 25        # a tenth of the recipe, and a tenth of the ratio

The published recipe trains from random weights: 1x1x1 networks, AdamW at 1e-4, batches of 512, 250 epochs. The other
side is where `train` starts: affine 3x3x3 maps in closed form. Both read the same pairs, and both are judged by their
mean squared error on the validation pairs, which is not timed. Seconds are those of the clock, with one thread: let
nothing else run. The last line tells where a training of the default network spends its time: the seconds of its
epochs, and how many of them it waited for data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kvae_comfyui.training.adapters import train
from kvae_comfyui.training.adapters.closed_form import fit_both_ways
from kvae_comfyui.training.data.dataset import Pairs, open_pairs
from kvae_comfyui.training.directions import DIRECTIONS
from kvae_comfyui.training.runtime.log import read_log

CPU = torch.device("cpu")
PUBLISHED = {"network": "published", "batch_size": 512, "lr": 1e-4, "ema": 0.0}


def main() -> None:
    """Print both sides, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-root", required=True, help="folder of pairs to train on")
    parser.add_argument("--val-latent-root", required=True, help="folder of pairs to validate on")
    parser.add_argument("--epochs", type=int, default=250, help="epochs of the published recipe (default 250)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    roots = {"latent_root": options.latent_root, "val_latent_root": options.val_latent_root}

    start = time.perf_counter()
    fits = fit_both_ways(open_pairs(options.latent_root), "cpu")
    maps = {name: fit.solve() for name, fit in fits.items()}
    closed_form = time.perf_counter() - start
    val = open_pairs(options.val_latent_root)
    ours = {name: error(network, name, val) for name, network in maps.items()}
    print(f"closed form: {closed_form:.1f} s, {shown(ours)}", flush=True)

    log = log_of_training(**roots, **PUBLISHED, epochs=options.epochs)
    published, _ = epoch_seconds(log)
    theirs = {name: min(row[f"val_{name}"] for row in log if f"val_{name}" in row) for name in DIRECTIONS}
    print(f"published recipe, {options.epochs} epochs: {published:.1f} s, {shown(theirs)}", flush=True)
    reached = all(ours[name] <= theirs[name] for name in ours)
    print(f"ratio 1/{published / closed_form:.0f}" if reached else "the closed form has not reached that error")

    seconds, waited = epoch_seconds(log_of_training(**roots, epochs=2))
    print(f"default network, 2 epochs: {seconds:.1f} s, of which {waited:.2f} s ({waited / seconds:.1%}) for data")


def log_of_training(**options: Any) -> list[dict]:
    """Train into a folder that is then deleted, and return the rows of train.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        files = {f"out_{name}": str(Path(folder, f"{name}.safetensors")) for name in DIRECTIONS}
        with contextlib.redirect_stdout(io.StringIO()):
            train.run(train.TrainConfig(**{"device": "cpu"} | options | files))
        return read_log(Path(folder, "train.jsonl"))


def epoch_seconds(log: list[dict]) -> tuple[float, float]:
    """Seconds of all epochs without validation, and how many of them the training waited for data."""
    seconds, waited = (sum(row.get(key, 0.0) for row in log) for key in ("seconds", "waited"))
    return seconds, waited


@torch.inference_mode()
def error(network: torch.nn.Module, direction: str, val: Pairs) -> float:
    """Mean squared error of a direction over the validation pairs."""
    errors = []
    for i in range(len(val)):
        z_h, z_k = val.batch([i], CPU)
        source, target = DIRECTIONS[direction].ordered(z_h, z_k)
        errors.append(F.mse_loss(network(source), target).item())
    return sum(errors) / len(errors)


def shown(errors: dict[str, float]) -> str:
    """Both errors, for one line of the output."""
    return f"validation MSE H→K {errors['h2k']:.4f}, K→H {errors['k2h']:.4f}"


if __name__ == "__main__":
    main()
