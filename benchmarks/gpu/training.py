"""A training of the default adapters on latents of full size: clips a second, and how much of the time data takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from kvae_comfyui.benchmarks.gpu.setup import Setup
from kvae_comfyui.benchmarks.training_time import epoch_seconds, log_of_training
from kvae_comfyui.training.data.pairs import SUFFIX, Pair, Source, write_pair

BATCH = 8


def section(setup: Setup) -> Iterator[str]:
    """One row. The first epoch warms up and is not counted."""
    yield "## Training the default adapters, both directions at once"
    yield ""
    yield f"Pairs of {list(setup.pair_shape)}, float16, random; batches of {BATCH}; float32, as `train` does it."
    yield ""
    yield "| clips a second | ms a step | of which waiting for data |"
    yield "|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(setup, Path(folder))
        log = log_of_training(latent_root=folder, epochs=setup.epochs, batch_size=BATCH, device=str(setup.device))
    epochs = [row for row in log if "seconds" in row]
    seconds, waited = epoch_seconds(epochs[1:])
    steps = epochs[-1]["step"] - epochs[0]["step"]
    yield f"| {steps * BATCH / seconds:.0f} | {1000 * seconds / steps:.1f} | {waited / seconds:.1%} |"


def write_pairs(setup: Setup, folder: Path) -> None:
    """Random pairs, each of a video of its own."""
    generator = torch.Generator().manual_seed(0)
    for i in range(setup.pairs):
        z_h, z_k = (torch.randn(setup.pair_shape, generator=generator) for _ in range(2))
        t, h, w = setup.pair_shape[1:]
        source = Source(f"{i}.mp4", 0, 4 * (t - 1) + 1, 0, 8 * h, 8 * w)
        write_pair(folder / f"{i}{SUFFIX}", Pair(z_h, z_k, source))
