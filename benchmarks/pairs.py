"""What the pairs are best made of: the default recipe on pairs extracted in several ways, judged on the same clips.

    python -m benchmarks.pairs --videos-root UCF101 --work bench-pairs

One clip of each video of groups g08 and up and its mirror image, in as many pairs and steps for every row: 17 frames
of 128x128 from the start, the posterior's mode, but for what the row says. Judged on one clip of each video of g01 to
g07: the first 17 frames of 128x128, of 192x256, and frame 0 alone. What is made stays under --work: the same command
goes on after an interruption.
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

from kvae_comfyui.benchmarks.adapters import SIDE, Bench, Row, paired, share, train_rows
from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.training.adapters.recipe import DEFAULT, Errors, Networks, with_change
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.videos import find_videos
from kvae_comfyui.training.directions import DIRECTIONS

# z_h HunyuanVideo's latents, z_k KVAE's, [B, c, t, h, w]

Size = tuple[int, int, int]
CLIP: Size = (17, SIDE, SIDE)  # frames, height, width
LARGE: Size = (17, 192, 256)
SIZES: list[Size] = [CLIP, (33, 96, 160), (9, 192, 192)]
EXTRACTIONS: dict[str, dict[str, Any]] = {
    "mode": {},
    "sample": {"posterior": "sample"},
    "spread": {"sampling": "uniform"},
}


def main() -> None:
    """Extract, train, judge, print the tables; write them too, where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True, type=Path, help="UCF101, or part of it")
    parser.add_argument("--work", required=True, type=Path, help="folder for the pairs and the adapters")
    parser.add_argument("--epochs", type=int, default=13, help="of every row (default 13)")
    parser.add_argument("--clips", type=int, default=12, help="clips of the pixel figures (default 12)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    extract_all(options.videos_root, options.work)
    mode, *others = (({"latent_root": str(options.work / name)}, DEFAULT) for name in (*EXTRACTIONS, "sizes"))
    rows = {
        "mode, consecutive, one size": mode,
        "posterior samples": others[0],
        "frames spread over the video": others[1],
        "three sizes and lengths": others[2],
        "frame 0 alone as well": (mode[0], replace(DEFAULT, loss=partial(with_frame_0, factor=0.2))),
    }
    trained = train_rows(options.work, options.epochs, rows, seeds=1)
    publish(report(options.work, str(options.videos_root), trained, options.clips), options.write)


def extract_all(videos_root: Path, work: Path) -> None:
    """The pairs of every row, and those to judge on."""
    for name, changes in EXTRACTIONS.items():
        extract_one(videos_root, work / name, CLIP, mirror="yes", **changes)
    videos = find_videos(videos_root, "train")
    for n, size in enumerate(SIZES):  # each has a third of the videos
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
    frames, height, width = size
    options: Any = {
        "split": "train",
        "num_frames": frames,
        "height": height,
        "width": width,
        "fit": "stretch",
    } | changes
    extract.run(extract.ExtractConfig(str(videos_root), str(out), **options))


def with_frame_0(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, factor: float) -> Errors:
    """And pictures: latent 0 of a clip is what its first frame alone gives."""
    first = weight[:, :, :1] / weight[:, :, :1].sum((1, 2, 3, 4), keepdim=True)
    pictures = with_change(networks, z_h[:, :, :1], z_k[:, :, :1], first)
    pictures = {f"{name} of frame 0": factor * error for name, error in pictures.items()}
    return with_change(networks, z_h, z_k, weight) | pictures


@torch.inference_mode()
def report(work: Path, videos_root: str, rows: dict[str, Row], clips: int) -> Iterator[str]:
    """The tables, line by line, as Markdown."""
    bench, large = Bench(work, videos_root, clips), open_pairs(work / "large")
    for direction, name in zip(DIRECTIONS, ("H→K", "K→H"), strict=True):
        base: Tensor | None = None
        yield ""
        yield f"## {name}"
        yield ""
        yield "| | of variance | frame 0 | 192x256 | PSNR | − first row | PSNR source | − | flicker | − |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for row, trained in rows.items():
            networks = trained.networks[direction]
            shares = share(direction, networks, bench.pairs), share(direction, networks, bench.pairs, latents=1)
            cells = [f"{each:.2%}" for each in (*shares, share(direction, networks, large))]
            figures = bench.pixels(direction, networks)
            base = figures if base is None else base
            cells += [f"{figures[:, j].mean():.2f} | {paired(figures[:, j] - base[:, j])}" for j in range(3)]
            yield f"| {row} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
