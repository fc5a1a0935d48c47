"""The adapters that the benches compare: closed forms, trainings, and those that come with the tiny VAEs."""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.networks import Network
from kvae_comfyui.training.adapters import train
from kvae_comfyui.training.adapters.closed_form import fit_both_ways
from kvae_comfyui.training.adapters.recipe import DEFAULT, PUBLISHED, Recipe
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.directions import DIRECTIONS
from kvae_comfyui.training.vaes import TINY_ADAPTERS

Training = tuple[dict[str, Any], Recipe]  # options of `train` other than its defaults; the recipe
TRAININGS: dict[str, Training] = {
    "published, lr 1e-4": ({"network": "published", "lr": 1e-4, "ema": 0.0}, PUBLISHED),
    "published, lr 1e-3": ({"network": "published", "lr": 1e-3, "ema": 0.0}, PUBLISHED),
    "default": ({}, DEFAULT),
}


@dataclass
class BenchEntry:
    """One line of the tables: trained networks, and what their training cost.

    Attributes:
        networks: "h2k" and "k2h", each with one network for each seed.
        seconds: one training on the clock, the median over the seeds.
        steps: of one training.
        nmse: squared error on the validation pairs divided by the targets' variance; mean over both directions and all
            seeds.
        step_seconds: one step, measured in turns with other entries.
    """

    networks: dict[str, list[Network]]
    seconds: float = 0.0
    steps: int = 0
    nmse: float = math.nan
    step_seconds: float = math.nan


def closed_forms(work: Path) -> dict[str, BenchEntry]:
    """Affine maps of 1x1x1 and 3x3x3, each fitted in one pass over the pairs in work/train."""
    entries = {}
    for kernel in (1, 3):
        start = time.perf_counter()
        fits = fit_both_ways(open_pairs(work / "train"), "cpu", kernel)
        networks: dict[str, list[Network]] = {name: [fit.solve().eval()] for name, fit in fits.items()}
        entries[f"affine {kernel}x{kernel}x{kernel}"] = BenchEntry(networks, time.perf_counter() - start)
    return entries


def embedded() -> dict[str, BenchEntry]:
    """The adapters that come with the tiny VAEs."""
    adapters = {name: load_adapter(file) for name, file in TINY_ADAPTERS.items()}
    training = adapters["k2h"].training_info
    networks = {name: [adapter.network] for name, adapter in adapters.items()}
    return {"embedded": BenchEntry(networks, training["seconds"], training["steps"])}


def train_all(work: Path, epochs: int, seeds: int) -> dict[str, BenchEntry]:
    """Train every recipe for equal steps; then the better published one for as long as the default lasted."""
    entries = train_entries(work, epochs, TRAININGS, seeds)
    best = min((name for name in entries if name.startswith("published")), key=lambda name: entries[name].nmse)
    longer = round(epochs * entries["default"].seconds / max(entries[best].seconds, 1))
    return entries | train_entries(work, longer, {f"{best}, same time": TRAININGS[best]}, seeds)


def train_entries(work: Path, epochs: int, trainings: dict[str, Training], seeds: int) -> dict[str, BenchEntry]:
    """Run the trainings whose adapters are not yet in `work`: all with the first seed, then all with the next.

    So a slow hour of the machine slows all entries alike.
    """
    folders = {
        name: [work / re.sub(r"\W+", "_", name) / f"{epochs}_epochs_seed_{seed}" for seed in range(seeds)]
        for name in trainings
    }
    for seed in range(seeds):
        for name, (changes, recipe) in trainings.items():
            files = {f"out_{direction}": folders[name][seed] / f"{direction}.safetensors" for direction in DIRECTIONS}
            if not all(file.exists() for file in files.values()):
                paths = {"latent_root": work / "train", "val_latent_root": work / "val"} | files
                options: dict[str, Any] = {key: str(path) for key, path in paths.items()}
                train.run(train.TrainConfig(**options | {"epochs": epochs, "seed": seed} | changes), recipe)
    return {name: load_entry(folders[name]) for name in trainings}


def load_entry(folders: list[Path]) -> BenchEntry:
    """The entry of one training; each folder holds the adapters of one seed."""
    adapters = {d: [load_adapter(folder / f"{d}.safetensors") for folder in folders] for d in DIRECTIONS}
    trainings = [adapter.training_info for adapter in adapters["k2h"]]
    nmse = [adapter.metrics["val_mse_share_of_variance"] for d in DIRECTIONS for adapter in adapters[d]]
    networks = {d: [adapter.network for adapter in adapters[d]] for d in DIRECTIONS}
    seconds = statistics.median(training["seconds"] for training in trainings)
    return BenchEntry(networks, seconds, trainings[0]["steps"], statistics.mean(nmse))
