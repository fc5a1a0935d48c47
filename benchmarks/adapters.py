"""Adapters side by side on real clips: error in latents and pixels, flicker, noise, tiles, time.

    python -m benchmarks.adapters --videos-root UCF101 --work bench
    python -m benchmarks.adapters --videos-root UCF101 --work bench --write docs/results/adapters.md

The latents of the tiny VAEs are extracted once: to train on, five windows of each video of groups g08 and up, and their
mirror images; to judge, one window of each video of g01 to g07. Every recipe is trained once for each seed, in turns.
All of them have the same number of steps, except the "same time" row, which has as many as fit in the time of the
default. The
default recipe is then taken apart (`benchmarks.ingredients`), with one seed. Pairs and adapters stay under --work: the
same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvae_comfyui.adapters.networks import Network, Residual
from kvae_comfyui.benchmarks.entries import BenchEntry, closed_forms, embedded, train_all, train_entries
from kvae_comfyui.benchmarks.ingredients import ingredients
from kvae_comfyui.benchmarks.judge import (
    FRAMES,
    REVERSE,
    SIDE,
    Judge,
    frame_deviation,
    mean_and_difference,
    median_seconds,
    nmse,
    tile_deviation,
)
from kvae_comfyui.benchmarks.tables import head, publish
from kvae_comfyui.training.adapters.recipe import DEFAULT, Recipe
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.directions import DIRECTIONS

NOISES = (0.03, 0.1)  # deviation of white noise in the latents, divided by each channel's own
COLUMNS = """\
- *of variance*: squared error of the latents divided by the variance of the target latents (NMSE), over all pairs.
- *PSNR*: the decode against the original. *PSNR source*: against the source VAE's decode of the same latent.
- *flicker*: root mean square of the change of the error from frame to frame, in 0..255.
- *−*: mean difference to the entry that the column names, clip by clip, ± its standard error over the clips.
- *s*: seconds of one training on the clock. *ms*: the adapter on one clip. *of a decode*: that time divided by the time
  of the tiny KVAE's decode.
- *frame 0*: relative difference between frame 0 mapped alone and frame 0 of the clip. *tile*: the same for a tile of
  half the width, receptive field excluded. 0 means that the network is causal and local.
- *noise*: white noise in the source latents, in per cent of each channel's deviation, the same for all rows.
- *a step*: time of one training step divided by that of the first row, measured in turns."""


def main() -> None:
    """Extract, train and judge; print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True, help="UCF101, or part of it")
    parser.add_argument("--work", required=True, type=Path, help="folder for the pairs and the adapters")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of every trained row (default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every row, by seed (default 3)")
    parser.add_argument("--clips", type=int, default=24, help="clips to judge in pixels (default 24)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    work, videos, size = options.work, options.videos_root, {"height": SIDE, "width": SIDE, "fit": "stretch"}
    windows = {"clips_per_video": 5, "mirror": "yes"}
    extract.run(extract.ExtractConfig(videos, str(work / "train"), split="train", **size, **windows))  # type: ignore[arg-type]
    extract.run(extract.ExtractConfig(videos, str(work / "val"), split="test", **size))  # type: ignore[arg-type]
    entries = closed_forms(work) | train_all(work, options.epochs, options.seeds) | embedded()
    parts = train_entries(work, options.epochs, ingredients(), seeds=1)
    time_steps(work, parts | {"default": entries["default"]})
    publish(report(Judge(work, videos, options.clips), work, entries, parts), options.write)


def time_steps(work: Path, entries: dict[str, BenchEntry]) -> None:
    """Time one step of the default and of each ingredient, in turns: the loss of 8 crops and its gradients."""
    batch = open_pairs(work / "train").crops(np.arange(8), Residual(16, 16).radius, 0, 0, torch.device("cpu"))
    recipes = {name: recipe for name, (_, recipe) in ingredients().items()} | {"default": DEFAULT}

    def step(recipe: Recipe, networks: dict[str, Network]) -> None:
        torch.stack(list(recipe.loss(networks, *batch).values())).sum().backward()

    def trainable(entry: BenchEntry) -> dict[str, Network]:
        return {d: deepcopy(entry.networks[d][0]).requires_grad_() for d in DIRECTIONS}  # loaded networks are frozen

    runs = [partial(step, recipes[name], trainable(entry)) for name, entry in entries.items()]
    for entry, seconds in zip(entries.values(), median_seconds(*runs), strict=True):
        entry.step_seconds = seconds


@torch.inference_mode()
def report(judge: Judge, work: Path, entries: dict[str, BenchEntry], parts: dict[str, BenchEntry]) -> Iterator[str]:
    """The results file, line by line.

    Args:
        entries: the adapters to compare; one is "default", and at least one begins with "published".
        parts: the default recipe's ingredients; the first is the one that the others are compared with.
    """
    default = entries["default"]
    seeds = len(default.networks["h2k"])
    yield from head(
        "Adapters compared",
        f"The tiny VAEs; trained on {len(open_pairs(work / 'train'))} pairs, seeds: {seeds}; judged on "
        f"{len(judge.pairs)} pairs in latents and on {len(judge.clips)} clips of {FRAMES} frames of {SIDE}x{SIDE} "
        "in pixels. The third table of each direction has one seed.",
    )
    yield ""
    yield from COLUMNS.splitlines()
    for direction in DIRECTIONS:
        references = reference_metrics(judge, direction)
        metrics = {name: judge.pixels(direction, entry.networks[direction]) for name, entry in entries.items()}
        best = max((name for name in metrics if name.startswith("published")), key=lambda n: metrics[n][:, 1].mean())
        yield ""
        yield f"## {DIRECTIONS[direction].arrow}"
        yield ""
        yield from quality_table(judge, direction, entries, references | metrics, best)
        yield ""
        yield from cost_table(judge, direction, entries, best)
        yield ""
        yield from ingredients_table(judge, direction, parts | {"default": default})


def reference_metrics(judge: Judge, direction: str) -> dict[str, Tensor]:
    """[clips, 3] metrics of the ways without an adapter: the pixel path, the source VAE alone, the target VAE alone."""
    paths = [judge.metrics(direction, i, judge.pixel_path(direction, i)) for i in judge.clips]
    metrics = {"pixel path": torch.tensor(paths)}
    for way in (REVERSE[direction], direction):
        decodes = [judge.metrics(direction, i, judge.direct[way, i]) for i in judge.clips]
        metrics[alone(way)] = torch.tensor(decodes)
    return metrics


def alone(direction: str) -> str:
    """The row of a direction's target VAE, which decodes its own latents."""
    return f"{DIRECTIONS[direction].decoder} alone"


def quality_table(
    judge: Judge, direction: str, entries: dict[str, BenchEntry], metrics: dict[str, Tensor], best: str
) -> Iterator[str]:
    """Error in latents, PSNR, PSNR source and flicker of the references and of every entry.

    Args:
        metrics: [clips, 3] of each row.
        best: the published entry with the best PSNR source.
    """
    source, target = alone(REVERSE[direction]), alone(direction)
    yield f"| | of variance | PSNR | − pixel path | PSNR source | − best published | flicker | − {target} |"
    yield "|---|---|---|---|---|---|---|---|"
    base = torch.stack([metrics["pixel path"][:, 0], metrics[best][:, 1], metrics[target][:, 2]], 1)
    for name, found in metrics.items():
        of_variance = (
            f"{nmse(direction, entries[name].networks[direction], judge.pairs):.2%}" if name in entries else ""
        )
        cells = [mean_and_difference(found[:, j], base[:, j]) for j in range(3)]
        if name == source:
            cells[1] = " | "  # its own decode is the reference
        yield f"| {name} | {of_variance} | {' | '.join(cells)} |"


def cost_table(judge: Judge, direction: str, entries: dict[str, BenchEntry], best: str) -> Iterator[str]:
    """Steps, time, size, locality and PSNR source under noise of every entry, by its first seed."""
    noisy = " | ".join(f"PSNR source, {noise:.0%} noise | − best published" for noise in NOISES)
    yield f"| | steps | s | weights | ms | of a decode | frame 0 | tile | {noisy} |"
    yield "|" + "---|" * (8 + 2 * len(NOISES))
    of_source = [f"{judge.noise_in_source(direction, noise).mean():.2f} |" for noise in NOISES]
    yield f"| {alone(REVERSE[direction])} |{' |' * 7} {' | '.join(of_source)} |"
    z, _ = judge.latents(direction, 0)
    published = [judge.pixels(direction, entries[best].networks[direction][:1], noise)[:, 1] for noise in NOISES]
    for name, entry in entries.items():
        network = entry.networks[direction][0]
        weights = sum(p.numel() for p in network.parameters())
        seconds, decode = median_seconds(partial(network, z), partial(judge.kvae.decode, z))
        cells = [f"{entry.steps}", f"{entry.seconds:.0f}", f"{weights:,}", f"{1000 * seconds:.1f}"]
        cells += [f"{seconds / decode:.1%}", f"{frame_deviation(network, z):.1e}", f"{tile_deviation(network, z):.1e}"]
        for noise, theirs in zip(NOISES, published, strict=True):
            ours = theirs if name == best else judge.pixels(direction, [network], noise)[:, 1]
            cells.append(mean_and_difference(ours, theirs))
        yield f"| {name} | {' | '.join(cells)} |"


def ingredients_table(judge: Judge, direction: str, parts: dict[str, BenchEntry]) -> Iterator[str]:
    """What each change of the recipe wins or loses against the first entry, with the same seed on both sides."""
    first = next(iter(parts))
    last = f"PSNR source, {NOISES[-1]:.0%} noise"
    yield f"| | a step | of variance | PSNR | − {first} | PSNR source | − | flicker | − | {last} | − |"
    yield "|" + "---|" * 11
    base: Tensor | None = None
    for name, entry in parts.items():
        networks = entry.networks[direction][:1]
        noisy = judge.pixels(direction, networks, NOISES[-1])[:, 1:2]
        metrics = torch.cat([judge.pixels(direction, networks), noisy], 1)
        base = metrics if base is None else base
        cells = [
            f"{entry.step_seconds / parts[first].step_seconds:.2f}",
            f"{nmse(direction, networks, judge.pairs):.2%}",
        ]
        cells += [mean_and_difference(metrics[:, j], base[:, j]) for j in range(4)]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
