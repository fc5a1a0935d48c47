"""Memory to decode clips of growing length into a video file: how far the process grows, as the system sees it.

    python -m benchmarks.length            # prints the table
    python -m benchmarks.length --kvae kandinskylab/KVAE-3D-1.0 --adapter-h2k FILE --size 512x512

Each length has its own process, with allocator settings with which freed memory goes back to the system at once. What
is decoded is a random HunyuanVideo latent, through an adapter, by the code of KVAE Decode to Video. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from kvae_comfyui.benchmarks.peak import ALLOCATOR, ROOT, in_use
from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.serving.clip_files import write_clips
from kvae_comfyui.serving.host_vae import HostVAE, to_image
from kvae_comfyui.serving.video_writer import VideoWriter
from kvae_comfyui.training.served import ServedOptions, load_served

LENGTHS = (25, 100, 200)  # latent frames


def main() -> None:
    """Print the table, or measure one length in a process that was started for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvae", default="tiny")
    parser.add_argument("--adapter-h2k", default="")
    parser.add_argument("--size", default="128x128", help="HEIGHTxWIDTH of the video (default 128x128)")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.length:
        height, width = map(int, options.size.split("x"))
        served = ServedOptions(kvae=options.kvae, adapter_h2k=options.adapter_h2k, device="cpu")
        print(json.dumps(growth(served, options.length, height, width)))
    else:
        publish(table(sys.argv[1:]), None)


def table(arguments: list[str]) -> Iterator[str]:
    """The table, line by line."""
    yield "| latent frames | frames | growth, MB | divided by the first |"
    yield "|---|---|---|---|"
    first = 0
    for length in LENGTHS:
        command = [sys.executable, "-m", "benchmarks.length", *arguments, "--length", str(length)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        first = first or found
        yield f"| {length} | {4 * (length - 1) + 1} | {found / 1e6:.1f} | {found / first:.3f} |"


@torch.no_grad()
def growth(options: ServedOptions, length: int, height: int, width: int) -> int:
    """Bytes by which the process grows while a clip is decoded into a file, the latent itself included.

    A clip of two segments before it loads code and kernels.
    """
    host = load_served(options, "hunyuan_video", ("decode",))
    _decode(host, 9, height, width)
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    _decode(host, length, height, width)
    return in_use("VmHWM") - before


def _decode(host: HostVAE, length: int, height: int, width: int) -> None:
    z = 2 * torch.randn(1, host.space.channels, length, height // 8, width // 8)
    frames = 4 * (length - 1) + 1
    with tempfile.TemporaryDirectory() as folder:

        def new_file(clip: int) -> VideoWriter:
            return VideoWriter(Path(folder) / "clip.mp4", width, height, 24.0)

        pictures = (to_image(x)[0].permute(1, 2, 3, 0) for x in host.decode_stream(z))
        write_clips(pictures, 1, frames, frames, new_file)


if __name__ == "__main__":
    main()
