"""`cache` compared with `extract` on the same clips: seconds, interleaved; and the peak memory of `cache` by length.

    python -m benchmarks.caching --videos-root VIDEOS --clips 8
    python -m benchmarks.caching --peak                                # Linux only

`extract` encodes each clip with both VAEs, `cache` with one of them, or with KVAE and an adapter. Both sides have one
thread for PyTorch, cut the same first frames of the same videos, and resize them to the same size, each in its own way.
Loading the VAEs is not timed. A peak is how far a process grows during a run over one made clip.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from kvae_comfyui.benchmarks.peak import ALLOCATOR, ROOT, in_use
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.serving.video_writer import write_video
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.videos import find_videos
from kvae_comfyui.training.musubi import cache
from kvae_comfyui.training.musubi.encoders import HUNYUAN, KVAE, EncoderOptions, load_encoder
from kvae_comfyui.training.options import DEVICE
from kvae_comfyui.training.vaes import load_hunyuan_vae, load_kvae_for_training

LENGTHS = (121, 481)


def main() -> None:
    """Time all sides in turns and print the ratios; or print the peaks, or measure one of them in this process."""
    options = parse_options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.run:
            encoder, frames = options.run
            print(peak(encoder, int(frames), options, Path(folder)))
        elif options.peak:
            print_peaks(options)
        else:
            print_seconds(options, Path(folder))


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", help="folder of videos")
    parser.add_argument("--clips", type=int, default=8, help="clips per round (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each side (default 3)")
    parser.add_argument("--size", default="33x128x128", help="FRAMESxHEIGHTxWIDTH (default 33x128x128)")
    parser.add_argument("--device", default=DEVICE, help="device of the VAEs")
    parser.add_argument("--peak", action="store_true", help=f"measure the peaks of clips of {LENGTHS} frames")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def print_seconds(options: argparse.Namespace, folder: Path) -> None:
    """Time `extract` and both encoders of `cache` in turns."""
    videos = linked_videos(options, folder / "videos")
    sides: dict[str, Callable[[Path], None]] = {"extract": partial(run_extract, videos, options)}
    sides |= {f"cache, {each}": partial(run_cache, videos, options, each) for each in (HUNYUAN, KVAE)}
    load_all(options)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(options.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side(folder / f"{name} {n}")
            seconds[name].append(time.perf_counter() - start)
            print(f"round {n + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, took in medians.items():
        print(f"{name}: {took:.1f} s, {took / medians['extract']:.2f} times that of extract")


def load_all(options: argparse.Namespace) -> None:
    """Load all VAEs, before the clock starts."""
    kept(load_hunyuan_vae, "tiny", options.device)
    kept(load_kvae_for_training, "tiny", options.device)
    for encoder in (HUNYUAN, KVAE):
        kept_encoder(encoder, options)


def kept_encoder(encoder: str, options: argparse.Namespace) -> Callable:
    """The encoder of `cache`, loaded once."""
    settings = EncoderOptions(encoder=encoder, device=options.device, dtype="fp32")
    return kept(load_encoder, settings, CACHED["hunyuan_video"].space, key=encoder)


def linked_videos(options: argparse.Namespace, folder: Path) -> Path:
    """A folder of links to the first videos, and captions for them."""
    folder.mkdir()
    for video in find_videos(options.videos_root)[: options.clips]:
        (folder / video.name).symlink_to(video.resolve())
        (folder / video.name).with_suffix(".txt").write_text("a caption")
    return folder


def run_extract(videos: Path, options: argparse.Namespace, out: Path) -> None:
    """Extract pairs of the first frames of each video."""
    frames, height, width = map(int, options.size.split("x"))
    config = extract.ExtractConfig(
        videos_root=str(videos),
        output_root=str(out),
        num_frames=frames,
        height=height,
        width=width,
        device=options.device,
        dtype="float32",
        fit="crop",
    )
    loaded: dict[str, Any] = {
        "load_hunyuan_vae": kept(load_hunyuan_vae, "tiny", options.device),
        "load_kvae_for_training": kept(load_kvae_for_training, "tiny", options.device),
    }
    with contextlib.redirect_stdout(io.StringIO()), patch.multiple(extract, **loaded):
        extract.run(config)


def run_cache(videos: Path, options: argparse.Namespace, encoder: str, out: Path) -> None:
    """Cache the first frames of each video."""
    frames, height, width = map(int, options.size.split("x"))
    dataset: dict[str, Any] = {"video_directory": str(videos), "cache_directory": str(out), "caption_extension": ".txt"}
    dataset |= {"resolution": [width, height], "target_frames": [frames]}
    path = out.with_suffix(".json")
    path.write_text(json.dumps({"datasets": [dataset]}))
    config = cache.CacheConfig(
        dataset_config=str(path), architecture="hunyuan_video", encoder=encoder, device=options.device, dtype="fp32"
    )
    with contextlib.redirect_stdout(io.StringIO()), patch.object(cache, "load_encoder", kept_encoder(encoder, options)):
        cache.run(config)


_KEPT: dict = {}


def kept(load: Callable, *arguments: object, key: str = "") -> Callable:
    """A function that returns what is loaded once."""
    name = load.__name__, key
    if name not in _KEPT:
        _KEPT[name] = load(*arguments)
    return lambda *_: _KEPT[name]


def print_peaks(options: argparse.Namespace) -> None:
    """The peak of each encoder for clips of LENGTHS, and how much of the difference the clip's own bytes are."""
    _, height, width = map(int, options.size.split("x"))
    for encoder in (KVAE, HUNYUAN):
        peaks = []
        for frames in LENGTHS:
            command = [sys.executable, "-m", "benchmarks.caching", "--size", options.size, "--device", options.device]
            done = subprocess.run(
                [*command, "--run", encoder, str(frames)], cwd=ROOT, env=os.environ | ALLOCATOR,
                stdout=subprocess.PIPE, check=True,
            )  # fmt: skip
            peaks.append(int(done.stdout))
            own = 3 * frames * height * width
            print(f"{encoder}, {frames} frames: {peaks[-1] / 1e6:.0f} MB, of which the clip has {own / 1e6:.0f} MB")


def peak(encoder: str, frames: int, options: argparse.Namespace, folder: Path) -> int:
    """Bytes that this process grows by in one run over a made clip, after a run over a short one."""
    _, height, width = map(int, options.size.split("x"))
    noise = np.random.default_rng(0).integers(0, 256, (3, 1, height, width), np.uint8)
    for name, length in (("short", 33), ("long", frames)):
        (folder / name).mkdir()
        write_video(folder / name / "a.mp4", torch.from_numpy(noise).expand(3, length, height, width), 24)
        (folder / name / "a.txt").write_text("a caption")
    options.size = f"33x{height}x{width}"
    run_cache(folder / "short", options, encoder, folder / "out")
    options.size = f"{frames}x{height}x{width}"
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    run_cache(folder / "long", options, encoder, folder / "outs")
    return in_use("VmHWM") - before


if __name__ == "__main__":
    main()
