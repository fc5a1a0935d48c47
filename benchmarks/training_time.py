"""Seconds to the published recipe's final latent error, on the same pairs, in one run.

    python -m benchmarks.training_time --latent-root latents/train --val-latent-root latents/val
    python -m benchmarks.training_time … --epochs 25        # a tenth of the recipe, and a tenth of the ratio

The published recipe trains from random weights: 1x1x1 networks, AdamW at 1e-4, batches of 512, 250 epochs. The other
side is the first pass of `train`: affine 3x3x3 maps in closed form. Both read the same pairs, and both are judged by
their mean squared error on the validation pairs, outside of the time that is counted. The last line is where the time
of a training of the default network went: its epochs' seconds, and how many of them it waited for data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from kvae_comfyui.training import train
from kvae_comfyui.training.dataset import Pairs, open_pairs

PUBLISHED = {"network": "published", "batch_size": 512, "lr": 1e-4, "ema": 0.0}


def main() -> None:
    """Print both sides, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-root", required=True)
    parser.add_argument("--val-latent-root", required=True)
    parser.add_argument("--epochs", type=int, default=250, help="of the published recipe (default 250)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    roots = {"latent_root": options.latent_root, "val_latent_root": options.val_latent_root, "device": options.device}
    val = open_pairs(options.val_latent_root)

    start = time.perf_counter()
    fits = train._first_pass(open_pairs(options.latent_root), train.TrainConfig(**roots))
    maps = {name: fit.solve().to(options.device) for name, fit in fits.items()}
    closed_form = time.perf_counter() - start
    ours = {name: error(network, name, val, options.device) for name, network in maps.items()}
    print(f"closed form: {closed_form:.1f} s, {shown(ours)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        rows = run(train.TrainConfig(**roots, **PUBLISHED, epochs=options.epochs, **outputs(folder)), folder)  # type: ignore[arg-type]
        published = sum(row.get("seconds", 0) for row in rows)
        theirs = {name: min(row[f"val_{name}"] for row in rows if f"val_{name}" in row) for name in train.DIRECTIONS}
        print(f"published recipe, {options.epochs} epochs: {published:.1f} s, {shown(theirs)}", flush=True)
        reached = all(ours[name] <= theirs[name] for name in ours)
        print(f"ratio 1/{published / closed_form:.0f}" if reached else "the closed form has not reached that error")

        rows = run(train.TrainConfig(**roots, epochs=2, **outputs(folder)), folder)  # type: ignore[arg-type]
        seconds, waited = (sum(row.get(key, 0) for row in rows) for key in ("seconds", "waited"))
        print(f"default network, 2 epochs: {seconds:.1f} s, of which {waited:.2f} s ({waited / seconds:.1%}) for data")


def outputs(folder: str) -> dict[str, str]:
    return {f"out_{name}": str(Path(folder, f"{name}.safetensors")) for name in train.DIRECTIONS}


def run(config: train.TrainConfig, folder: str) -> list[dict]:
    """The rows of the training's log."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(config)
    return [json.loads(line) for line in Path(folder, "train.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def error(network: torch.nn.Module, name: str, val: Pairs, device: str) -> float:
    """Mean squared error of a direction over the validation pairs."""
    errors = []
    for i in range(len(val)):
        z_h, z_k = val.batch([i], torch.device(device))
        source, target = (z_h, z_k) if name == "h2k" else (z_k, z_h)
        errors.append(F.mse_loss(network(source), target).item())
    return sum(errors) / len(errors)


def shown(errors: dict[str, float]) -> str:
    return f"validation MSE H→K {errors['h2k']:.4f}, K→H {errors['k2h']:.4f}"


if __name__ == "__main__":
    main()
