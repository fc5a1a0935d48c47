"""Adapters between two grids beside the pixel path: HunyuanVideo's latents and those of KVAE 2.0-t4s16.

    python -m benchmarks.grids --videos-root UCF101 --work bench-grids --write docs/results/grids.md

Both adapters are trained by the default recipe, on one window of each video of groups g08 and up and its mirror image,
and judged on one window of each video of g01 to g07. The pixel path decodes a latent with the VAE that made it and
encodes the frames with the other VAE. Pairs and adapters stay under --work: the same command continues after an
interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.benchmarks.judge import FRAMES, REVERSE, SIDE, Judge, mean_and_difference, median_seconds, nmse
from kvae_comfyui.benchmarks.tables import head, publish
from kvae_comfyui.training.adapters import train
from kvae_comfyui.training.adapters.closed_form import affine_adapters, fit_both_ways
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.manifests import read_spaces
from kvae_comfyui.training.directions import DIRECTIONS

Adapters = dict[str, LatentAdapter]  # by direction
COLUMNS = """\
- *of variance*: squared error of the latents divided by the variance of the target latents (NMSE), over all pairs.
- *PSNR*: the decode against the original. *PSNR source*: against the source VAE's decode of the same latent.
- *flicker*: root mean square of the change of the error from frame to frame, in 0..255.
- *− pixel path*: mean difference, clip by clip, ± its standard error over the clips.
- *s*: seconds from a latent of one space to a latent of the other, for one clip, measured in turns."""


def main() -> None:
    """Extract, train and judge; print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True, help="UCF101, or part of it")
    parser.add_argument("--work", required=True, type=Path, help="folder for the pairs and the adapters")
    parser.add_argument("--hunyuan-vae", default="tiny", help="the VAE of HunyuanVideo (default tiny)")
    parser.add_argument("--kvae", default="tiny-t4s16", help="the KVAE 2.0-t4s16 (default tiny-t4s16)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the training (default 20)")
    parser.add_argument("--clips", type=int, default=24, help="clips to judge in pixels (default 24)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    work, vaes = options.work, {"hunyuan_vae": options.hunyuan_vae, "kvae": options.kvae}
    size: dict[str, Any] = {"num_frames": FRAMES, "height": SIDE, "width": SIDE, "fit": "stretch"}
    for name, split, mirror in (("train", "train", "yes"), ("val", "test", "no")):
        out = str(work / name)
        extract.run(extract.ExtractConfig(options.videos_root, out, split=split, mirror=mirror, **vaes, **size))
    adapters = trained(work, options.epochs)
    judge = Judge(work, options.videos_root, options.clips, options.hunyuan_vae, options.kvae)
    publish(report(judge, work, adapters), options.write)


def trained(work: Path, epochs: int) -> Adapters:
    """Both adapters, trained by the default recipe if they are not yet in `work`."""
    folder = work / f"{epochs}_epochs"
    files = {name: folder / f"{name}.safetensors" for name in DIRECTIONS}
    if not all(file.exists() for file in files.values()):
        out = {f"out_{name}": str(file) for name, file in files.items()}
        train.run(train.TrainConfig(str(work / "train"), str(work / "val"), epochs=epochs, **out))  # type: ignore[arg-type]
    return {name: load_adapter(file) for name, file in files.items()}


@torch.inference_mode()
def report(judge: Judge, work: Path, adapters: Adapters) -> Iterator[str]:
    """The results file, line by line."""
    pairs, (h, k) = open_pairs(work / "train"), read_spaces(work / "val")
    training = adapters["h2k"].training_info
    yield from head(
        "Adapters between two grids",
        f"{h.name} ({h.channels} channels, {h.spatial_factor}x{h.spatial_factor} pixels) and {k.name} ({k.channels}, "
        f"{k.spatial_factor}x{k.spatial_factor}); tiny VAEs. Trained on {len(pairs)} pairs, {training['steps']} steps, "
        f"{training['seconds']} s for both directions; judged on {len(judge.pairs)} pairs in latents and on "
        f"{len(judge.clips)} clips of {FRAMES} frames of {SIDE}x{SIDE} in pixels.",
    )
    yield ""
    yield from COLUMNS.splitlines()
    affine = affine_adapters(fit_both_ways(pairs, "cpu"), (h, k))
    for direction in DIRECTIONS:
        ways = {"affine 3x3x3": affine[direction], "default": adapters[direction]}
        yield ""
        yield f"## {DIRECTIONS[direction].arrow}: {adapters[direction].source.name} → {adapters[direction].target.name}"
        yield ""
        yield from table(judge, direction, ways)


def table(judge: Judge, direction: str, ways: Adapters) -> Iterator[str]:
    """Both VAEs alone, the pixel path, and each adapter."""
    yield "| | of variance | PSNR | − pixel path | PSNR source | − pixel path | flicker | − pixel path | s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    alone = {f"{DIRECTIONS[way].decoder} alone": way for way in (REVERSE[direction], direction)}
    found = {
        name: measured(judge, direction, {i: judge.direct[way, i] for i in judge.clips}) for name, way in alone.items()
    }
    path = measured(judge, direction, {i: judge.pixel_path(direction, i) for i in judge.clips})
    found["pixel path"] = path
    found |= {name: judge.pixels(direction, [each]) for name, each in ways.items()}
    seconds = dict(zip(("pixel path", *ways), times(judge, direction, ways), strict=True))
    for name, metrics in found.items():
        of_variance = f"{nmse(direction, [ways[name]], judge.pairs):.2%}" if name in ways else ""
        cells = [of_variance, *(mean_and_difference(metrics[:, j], path[:, j]) for j in range(3))]
        if alone.get(name) == REVERSE[direction]:
            cells[2] = " | "  # its own decode is the reference
        cells.append(f"{seconds[name]:.3f}" if name in seconds else "")
        yield f"| {name} | {' | '.join(cells)} |"


def measured(judge: Judge, direction: str, decodes: dict[int, Tensor]) -> Tensor:
    """[clips, 3] metrics of decodes of the clips."""
    return torch.tensor([judge.metrics(direction, i, y) for i, y in decodes.items()])


def times(judge: Judge, direction: str, ways: Adapters) -> list[float]:
    """Seconds of the pixel path, and of each adapter as Convert Latent runs it, for one clip."""
    z, _ = judge.latents(direction, judge.clips[0])
    source, target = judge.target[REVERSE[direction]], judge.target[direction]

    def pixel_path() -> Tensor:
        return target.encode(source.decode(z).round().byte())

    return median_seconds(pixel_path, *(partial(each.convert, z) for each in ways.values()))


if __name__ == "__main__":
    main()
