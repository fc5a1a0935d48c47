"""Adapters side by side on real clips: latents, pixels, shimmer, noise, tiles, time.

    python -m benchmarks.adapters --videos-root UCF101 --work bench
    python -m benchmarks.adapters --videos-root UCF101 --work bench --write docs/adapters-table.md

The embedded pair's latents are extracted once (five windows of each video of groups g08 and up and their mirror images
to train on; one of g01 to g07 to judge), and every row is trained once for each seed, row after row and seed by seed,
so that a slow hour is everyone's. Both stay under --work: the same command goes on after an interruption. All rows have
the same number of steps; the "same time" row has as many as fit in the time that the default took. `ingredients` takes
the default apart, one seed each.

Pixels are those of the first 17 frames of some clips, evenly spread. Each mean stands beside the mean of a difference
clip by clip, ± its standard error: what a table of means hides.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.networks import Network, Residual
from kvae_comfyui.benchmarks.ingredients import ingredients
from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.training.adapters import train
from kvae_comfyui.training.adapters.closed_form import fit_both_ways
from kvae_comfyui.training.adapters.recipe import DEFAULT, PUBLISHED, Recipe
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.dataset import Pairs, open_pairs, spread
from kvae_comfyui.training.directions import DIRECTIONS
from kvae_comfyui.training.evaluate.evaluate import flicker, psnr
from kvae_comfyui.training.evaluate.originals import original_frames
from kvae_comfyui.training.vaes import TINY_ADAPTERS, VideoVAE, load_hunyuan_vae, load_kvae_for_training

# B batch, c channels, t latent frames, h/w latent rows and columns; T frames, H/W pixels
# z_Bcthw raw latents, y_B3THW decoded pixels in 0..255

Options = dict[str, Any]
BACK = dict(zip(DIRECTIONS, reversed(DIRECTIONS), strict=True))
SIDE = 128
LATENTS = 5  # of the pixel figures: 17 frames
ROUNDS = 5  # of every timing
NOISES = (0.03, 0.1)  # deviation of white noise in the latents, as a share of each channel's own
RECIPES: dict[str, tuple[Options, Recipe]] = {  # what differs from the defaults of `python -m training train`
    "published, lr 1e-4": ({"network": "published", "lr": 1e-4, "ema": 0.0}, PUBLISHED),
    "published, lr 1e-3": ({"network": "published", "lr": 1e-3, "ema": 0.0}, PUBLISHED),
    "default": ({}, DEFAULT),
}


def main() -> None:
    """Extract, train, judge, print the tables; write them too, where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True, help="UCF101, or part of it")
    parser.add_argument("--work", required=True, type=Path, help="folder for the pairs and the adapters")
    parser.add_argument("--epochs", type=int, default=10, help="of every trained row (default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every row (default 3)")
    parser.add_argument("--clips", type=int, default=24, help="clips of the pixel figures (default 24)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    work, videos, size = options.work, options.videos_root, {"height": SIDE, "width": SIDE, "fit": "stretch"}
    windows = {"clips_per_video": 5, "mirror": "yes"}
    extract.run(extract.ExtractConfig(videos, str(work / "train"), split="train", **size, **windows))  # type: ignore[arg-type]
    extract.run(extract.ExtractConfig(videos, str(work / "val"), split="test", **size))  # type: ignore[arg-type]
    rows = closed_forms(work) | train_all(work, options.epochs, options.seeds) | embedded()
    parts = train_rows(work, options.epochs, ingredients(), seeds=1)
    time_steps(work, parts | {"default": rows["default"]})
    publish(report(work, videos, rows, parts, options.clips), options.write)


@dataclass
class Row:
    """An adapter both ways: one pair of networks for each seed, what a training took, and what it came to."""

    networks: dict[str, list[Network]]
    seconds: float = 0.0
    steps: int = 0
    error: float = math.nan  # on the validation pairs, share of the variance, mean of both directions and all seeds
    step: float = math.nan  # seconds of one, measured beside other rows


def closed_forms(work: Path) -> dict[str, Row]:
    """The affine maps of 1x1x1 and 3x3x3, fitted in one pass."""
    rows = {}
    for kernel in (1, 3):
        start = time.perf_counter()
        fits = fit_both_ways(open_pairs(work / "train"), "cpu", kernel)
        networks: dict[str, list[Network]] = {name: [fit.solve().eval()] for name, fit in fits.items()}
        rows[f"affine {kernel}x{kernel}x{kernel}"] = Row(networks, time.perf_counter() - start)
    return rows


def embedded() -> dict[str, Row]:
    """The adapters that come with the tiny pair."""
    adapters = {name: load_adapter(file) for name, file in TINY_ADAPTERS.items()}
    about = adapters["k2h"].training_info
    networks = {name: [adapter.network] for name, adapter in adapters.items()}
    return {"embedded": Row(networks, about["seconds"], about["steps"])}


def train_all(work: Path, epochs: int, seeds: int) -> dict[str, Row]:
    """Every recipe with equal steps; then the better of the published ones again, for as long as the default took."""
    rows = train_rows(work, epochs, RECIPES, seeds)
    best = min((name for name in rows if name.startswith("published")), key=lambda name: rows[name].error)
    longer = round(epochs * rows["default"].seconds / max(rows[best].seconds, 1))
    return rows | train_rows(work, longer, {f"{best}, same time": RECIPES[best]}, seeds)


def train_rows(work: Path, epochs: int, recipes: dict[str, tuple[Options, Recipe]], seeds: int) -> dict[str, Row]:
    """Train what is not there yet, seed by seed and row by row."""
    folders = {
        name: [work / re.sub(r"\W+", "_", name) / f"{epochs}_epochs_seed_{seed}" for seed in range(seeds)]
        for name in recipes
    }
    for seed in range(seeds):
        for name, (changes, recipe) in recipes.items():
            files = {f"out_{direction}": folders[name][seed] / f"{direction}.safetensors" for direction in DIRECTIONS}
            if not all(file.exists() for file in files.values()):
                paths = {"latent_root": work / "train", "val_latent_root": work / "val"} | files
                options: Options = {key: str(path) for key, path in paths.items()} | {"epochs": epochs, "seed": seed}
                train.run(train.TrainConfig(**options | changes), recipe)
    rows = {}
    for name in recipes:
        adapters = {d: [load_adapter(folder / f"{d}.safetensors") for folder in folders[name]] for d in DIRECTIONS}
        infos = [adapter.training_info for adapter in adapters["k2h"]]
        took = statistics.median(info["seconds"] for info in infos)
        errors = [adapter.metrics["val_mse_share_of_variance"] for d in DIRECTIONS for adapter in adapters[d]]
        networks = {d: [adapter.network for adapter in adapters[d]] for d in DIRECTIONS}
        rows[name] = Row(networks, took, infos[0]["steps"], statistics.mean(errors))
    return rows


def time_steps(work: Path, rows: dict[str, Row]) -> None:
    """How long a step takes by the default and by each ingredient: the loss of 8 crops and its gradients, in turns."""
    batch = open_pairs(work / "train").crops(np.arange(8), Residual(16, 16).radius, 0, 0, torch.device("cpu"))
    recipes = {name: recipe for name, (_, recipe) in ingredients().items()} | {"default": DEFAULT}

    def step(recipe: Recipe, networks: dict[str, Network]) -> None:
        torch.stack(list(recipe.loss(networks, *batch).values())).sum().backward()

    runs = [partial(step, recipes[name], {d: row.networks[d][0] for d in DIRECTIONS}) for name, row in rows.items()]
    for row, takes in zip(rows.values(), seconds(*runs), strict=True):
        row.step = takes


@torch.inference_mode()
def report(work: Path, videos_root: str, rows: dict[str, Row], parts: dict[str, Row], clips: int) -> Iterator[str]:
    """The tables, line by line, as Markdown."""
    bench = Bench(work, videos_root, clips)
    seeds = len(rows["default"].networks["h2k"])
    yield f"{len(bench.pairs)} pairs, pixels of {len(bench.clips)} clips of {4 * LATENTS - 3} frames of {SIDE}x{SIDE},"
    yield f"{seeds} seeds, {torch.get_num_threads()} threads."
    for direction in DIRECTIONS:
        yield from bench.tables(direction, rows)
        yield from bench.ingredients(direction, rows["default"], parts)


class Bench:
    """Both VAEs, the validation pairs, and what every row is compared with: decoded once."""

    def __init__(self, work: Path, videos_root: str, clips: int):
        hunyuan, kvae = load_hunyuan_vae("tiny", "cpu"), load_kvae_for_training("tiny", "cpu")
        self.target: dict[str, VideoVAE] = {"h2k": kvae, "k2h": hunyuan}
        self.pairs = open_pairs(work / "val")
        self.clips = spread(len(self.pairs), clips)
        self.originals, self.direct = {}, {}
        for i in tqdm(self.clips, desc="direct decodes", leave=False, disable=None):
            pair = self.pairs[i]
            self.originals[i] = original_frames(self.pairs.name(i), pair, videos_root)[:, : 4 * LATENTS - 3].float()
            for direction in DIRECTIONS:
                self.direct[direction, i] = self.decode(direction, self.latents(direction, i)[1])
        self.kvae = kvae

    def latents(self, direction: str, i: int) -> tuple[Tensor, Tensor]:
        """Source and target latents of pair i, [1, c, t, h, w]."""
        z_h, z_k = self.pairs.batch([i], torch.device("cpu"))
        z_h, z_k = z_h[:, :, :LATENTS], z_k[:, :, :LATENTS]
        return DIRECTIONS[direction].ordered(z_h, z_k)

    def decode(self, direction: str, z_Bcthw: Tensor) -> Tensor:
        """[3, T, H, W] in 0..255 by the target VAE."""
        return self.target[direction].decode(z_Bcthw)[0]

    def pixel_path(self, direction: str, i: int) -> Tensor:
        """Decoded with the source VAE, encoded and decoded with the target VAE."""
        source = self.direct[BACK[direction], i]
        return self.decode(direction, self.target[direction].encode(source[None].round().byte()))

    def compare(self, direction: str, i: int, y_3THW: Tensor) -> tuple[float, float, float]:
        """PSNR against the original, PSNR against the source VAE's own decode, flicker."""
        x, source = self.originals[i], self.direct[BACK[direction], i]
        return psnr(y_3THW, x), psnr(y_3THW, source), flicker(y_3THW, x)

    def noisy(self, direction: str, i: int, noise: float) -> Tensor:
        """The source latents with white noise, the same for every row."""
        z, _ = self.latents(direction, i)
        draw = torch.randn(z.shape, generator=torch.Generator().manual_seed(i))
        return z + noise * z.std((0, 2, 3, 4), keepdim=True) * draw

    def noise_of_source(self, direction: str, noise: float) -> Tensor:
        """[clips] PSNR of what the source VAE decodes from noisy latents against its decode of the clean ones."""
        back = BACK[direction]
        decodes = {i: self.decode(back, self.noisy(direction, i, noise)) for i in self.clips}
        return torch.tensor([psnr(y, self.direct[back, i]) for i, y in decodes.items()])

    def pixels(self, direction: str, networks: list[Network], noise: float = 0.0) -> Tensor:
        """[clips, 3] of `compare`, means over the seeds."""
        found = []
        for i in self.clips:
            z = self.noisy(direction, i, noise)
            figures = [self.compare(direction, i, self.decode(direction, network(z))) for network in networks]
            found.append(torch.tensor(figures).mean(0))
        return torch.stack(found)

    def tables(self, direction: str, rows: dict[str, Row]) -> Iterator[str]:
        """Both tables of a direction."""
        name, *vaes = ("H→K", "Hunyuan", "KVAE") if direction == "h2k" else ("K→H", "KVAE", "Hunyuan")
        source, target = (f"{vae} alone" for vae in vaes)
        path = [self.compare(direction, i, self.pixel_path(direction, i)) for i in self.clips]
        figures = {"pixel path": torch.tensor(path)}
        for vae, way in (source, BACK[direction]), (target, direction):
            figures[vae] = torch.tensor([self.compare(direction, i, self.direct[way, i]) for i in self.clips])
        for row in tqdm(rows, desc=f"{name} decodes", leave=False, disable=None):
            figures[row] = self.pixels(direction, rows[row].networks[direction])
        best = max((row for row in rows if row.startswith("published")), key=lambda row: figures[row][:, 1].mean())
        yield ""
        yield f"## {name}"
        yield ""
        yield f"| | of variance | PSNR | − pixel path | PSNR source | − best published | flicker | − {target} |"
        yield "|---|---|---|---|---|---|---|---|"
        base = torch.stack([figures["pixel path"][:, 0], figures[best][:, 1], figures[target][:, 2]], 1)
        for row, each in figures.items():
            of_variance = f"{share(direction, rows[row].networks[direction], self.pairs):.2%}" if row in rows else ""
            cells = [f"{each[:, j].mean():.2f} | {paired(each[:, j] - base[:, j])}" for j in range(3)]
            if row == source:
                cells[1] = " | "  # of its own decode
            yield f"| {row} | {of_variance} | {' | '.join(cells)} |"
        yield ""
        noisy = " | ".join(f"PSNR source, {noise:.0%} noise | − best published" for noise in NOISES)
        yield f"| | steps | s | weights | ms | of a decode | frame 0 | tile | {noisy} |"
        yield "|" + "---|" * (8 + 2 * len(NOISES))
        own = [f"{self.noise_of_source(direction, noise).mean():.2f} |" for noise in NOISES]
        yield f"| {source} |{' |' * 7} {' | '.join(own)} |"
        z, _ = self.latents(direction, 0)
        published = [self.pixels(direction, rows[best].networks[direction][:1], noise)[:, 1] for noise in NOISES]
        for row, trained in rows.items():
            network = trained.networks[direction][0]
            weights = sum(p.numel() for p in network.parameters())
            takes, decode = seconds(partial(network, z), partial(self.kvae.decode, z))
            cells = [f"{trained.steps}", f"{trained.seconds:.0f}", f"{weights:,}", f"{1000 * takes:.1f}"]
            cells += [f"{takes / decode:.1%}", f"{frame_deviation(network, z):.1e}"]
            cells += [f"{tile_deviation(network, z):.1e}"]
            for noise, theirs in zip(NOISES, published, strict=True):
                ours = theirs if row == best else self.pixels(direction, [network], noise)[:, 1]
                cells += [f"{ours.mean():.2f}", paired(ours - theirs)]
            yield f"| {row} | {' | '.join(cells)} |"

    def ingredients(self, direction: str, default: Row, parts: dict[str, Row]) -> Iterator[str]:
        """What each change wins or loses, the same seed on both sides."""
        base: Tensor | None = None
        first = next(iter(parts))
        yield ""
        last = f"PSNR source, {NOISES[-1]:.0%} noise"
        yield f"| | a step | of variance | PSNR | − {first} | PSNR source | − | flicker | − | {last} | − |"
        yield "|" + "---|" * 11
        for name, row in (parts | {"default": default}).items():
            networks = row.networks[direction][:1]
            noisy = self.pixels(direction, networks, NOISES[-1])[:, 1:2]
            figures = torch.cat([self.pixels(direction, networks), noisy], 1)
            base = figures if base is None else base
            cells = [f"{row.step / parts[first].step:.2f}", f"{share(direction, networks, self.pairs):.2%}"]
            cells += [f"{figures[:, j].mean():.2f} | {paired(figures[:, j] - base[:, j])}" for j in range(4)]
            yield f"| {name} | {' | '.join(cells)} |"


def share(direction: str, networks: list[Network], pairs: Pairs, latents: int = LATENTS) -> float:
    """Squared error over the first latents of each pair, as a share of the targets' variance; mean over the seeds."""
    errors, targets = [], []
    for i in range(len(pairs)):
        z_h, z_k = (z[:, :, :latents] for z in pairs.batch([i], torch.device("cpu")))
        z, target = DIRECTIONS[direction].ordered(z_h, z_k)
        errors += [(network(z) - target).square().mean().item() for network in networks]
        targets.append(target)
    return statistics.mean(errors) / torch.cat(targets).var((0, 2, 3, 4)).mean().item()


def paired(difference: Tensor) -> str:
    """Mean ± standard error of differences clip by clip."""
    return f"{difference.mean():+.3f} ± {difference.std() / math.sqrt(len(difference)):.3f}"


def seconds(*runs: Callable[[], object]) -> list[float]:
    """Median times of these calls, in turns, after one that does not count."""
    times: list[list[float]] = []
    for _ in range(1 + ROUNDS):
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(each) for each in zip(*times[1:], strict=True)]


def frame_deviation(network: nn.Module, z_Bcthw: Tensor) -> float:
    """How far frame 0 alone is from frame 0 of the clip, as a share of the latter's root mean square."""
    whole = network(z_Bcthw)[:, :, :1]
    return ((network(z_Bcthw[:, :, :1]) - whole).norm() / whole.norm()).item()


def tile_deviation(network: Network, z_Bcthw: Tensor) -> float:
    """The same of a tile of half the width, beyond the receptive field of its inner border."""
    half = z_Bcthw.shape[4] // 2
    whole = network(z_Bcthw)[..., : half - network.radius]
    return ((network(z_Bcthw[..., :half])[..., : half - network.radius] - whole).norm() / whole.norm()).item()


if __name__ == "__main__":
    main()
