"""How best to extract pairs: the default recipe on pairs extracted in several ways, judged on the same clips.

    python -m benchmarks.pairs --videos-root UCF101 --work bench-pairs --write docs/results/pairs.md

Every row trains on the same number of pairs, for the same number of steps: one clip of each video of groups g08 and up,
and its mirror image. A clip is the first 17 frames of 128x128 and the posterior's mode, except for what the row names.
The adapters are judged on one clip of each video of g01 to g07: its first 17 frames of 128x128 and of 192x256, and
frame 0 alone. Pairs and adapters stay under --work: the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.entries import BenchEntry, Training, train_entries
from kvae_comfyui.benchmarks.judge import FRAMES, SIDE, Judge, mean_and_difference, nmse
from kvae_comfyui.benchmarks.tables import head, publish
from kvae_comfyui.training.adapters.recipe import DEFAULT, Errors, Networks, with_change
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.videos import find_videos
from kvae_comfyui.training.directions import DIRECTIONS

# z_h HunyuanVideo's latents, z_k KVAE's, [B, c, t, h, w]

Size = tuple[int, int, int]  # frames, height, width
CLIP: Size = (FRAMES, SIDE, SIDE)
LARGE: Size = (FRAMES, 192, 256)
SIZES: list[Size] = [CLIP, (33, 96, 160), (9, 192, 192)]
EXTRACTIONS: dict[str, dict[str, Any]] = {
    "mode": {},
    "sample": {"posterior": "sample"},
    "spread": {"sampling": "uniform"},
}
COLUMNS = """\
- *of variance*: squared error of the latents divided by the variance of the target latents (NMSE).
- *frame 0*: the same for the first latent frame alone. *192x256*: the same for pictures of that size.
- *PSNR*: the decode against the original. *PSNR source*: against the source VAE's decode of the same latent.
- *flicker*: root mean square of the change of the error from frame to frame, in 0..255.
- *−*: mean difference to the first row, clip by clip, ± its standard error over the clips."""


def main() -> None:
    """Extract, train and judge; print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True, type=Path, help="UCF101, or part of it")
    parser.add_argument("--work", required=True, type=Path, help="folder for the pairs and the adapters")
    parser.add_argument("--epochs", type=int, default=13, help="epochs of every row (default 13)")
    parser.add_argument("--clips", type=int, default=12, help="clips to judge in pixels (default 12)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    extract_all(options.videos_root, options.work)
    entries = train_entries(options.work, options.epochs, trainings(options.work), seeds=1)
    judge = Judge(options.work, str(options.videos_root), options.clips)
    publish(report(judge, options.work, entries), options.write)


def trainings(work: Path) -> dict[str, Training]:
    """The default recipe on each extraction, and a recipe that also learns frame 0 alone."""
    mode, sample, spread, sizes = (({"latent_root": str(work / name)}, DEFAULT) for name in (*EXTRACTIONS, "sizes"))
    return {
        "mode, consecutive, one size": mode,
        "posterior samples": sample,
        "frames spread over the video": spread,
        "three sizes and lengths": sizes,
        "frame 0 alone as well": (mode[0], replace(DEFAULT, loss=partial(with_frame_0, factor=0.2))),
    }


def extract_all(videos_root: Path, work: Path) -> None:
    """Extract the pairs of every row, and those to judge on."""
    for name, changes in EXTRACTIONS.items():
        extract_one(videos_root, work / name, CLIP, mirror="yes", **changes)
    videos = find_videos(videos_root, "train")
    for n, size in enumerate(SIZES):  # each gets a third of the videos
        third = work / "thirds" / str(n)
        for video in videos[n :: len(SIZES)]:
            link = third / video.relative_to(videos_root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(video.resolve())
        extract_one(third, work / "sizes" / str(n), size, split="all", mirror="yes")
    extract_one(videos_root, work / "val", CLIP, split="test")
    extract_one(videos_root, work / "large", LARGE, split="test")


def extract_one(videos_root: Path, out: Path, size: Size, **changes: Any) -> None:
    """Extract the training split with the tiny VAEs; `changes` are other options of `extract`."""
    frames, height, width = size
    options: dict[str, Any] = {"split": "train", "num_frames": frames, "height": height, "width": width}
    extract.run(extract.ExtractConfig(str(videos_root), str(out), **options | {"fit": "stretch"} | changes))


def with_frame_0(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, factor: float) -> Errors:
    """Errors of `with_change`, and `factor` times the same errors of latent 0 mapped alone, as a picture is."""
    first = weight[:, :, :1] / weight[:, :, :1].sum((1, 2, 3, 4), keepdim=True)
    pictures = with_change(networks, z_h[:, :, :1], z_k[:, :, :1], first)
    pictures = {f"{name} of frame 0": factor * error for name, error in pictures.items()}
    return with_change(networks, z_h, z_k, weight) | pictures


@torch.inference_mode()
def report(judge: Judge, work: Path, entries: dict[str, BenchEntry]) -> Iterator[str]:
    """The results file, line by line."""
    large = open_pairs(work / "large")
    yield from head(
        "Pairs compared",
        f"The tiny VAEs; the default recipe on {len(open_pairs(work / 'mode'))} pairs with one seed; judged on "
        f"{len(judge.pairs)} pairs in latents and on {len(judge.clips)} clips in pixels.",
    )
    yield ""
    yield from COLUMNS.splitlines()
    for direction in DIRECTIONS:
        base: Tensor | None = None
        yield ""
        yield f"## {DIRECTIONS[direction].arrow}"
        yield ""
        yield "| | of variance | frame 0 | 192x256 | PSNR | − first row | PSNR source | − | flicker | − |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for name, entry in entries.items():
            networks = entry.networks[direction]
            errors = nmse(direction, networks, judge.pairs), nmse(direction, networks, judge.pairs, latents=1)
            cells = [f"{error:.2%}" for error in (*errors, nmse(direction, networks, large))]
            metrics = judge.pixels(direction, networks)
            base = metrics if base is None else base
            cells += [mean_and_difference(metrics[:, j], base[:, j]) for j in range(3)]
            yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
