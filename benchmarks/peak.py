"""Peak memory of KVAE and of diffusers' KVAE on this machine's CPU. Each run has its own process.

    python -m benchmarks.peak              # prints the table

Models have full size and random weights, in float32. The peak is how far the process grows during the run, as the
system sees it: activations, the result, and what kernels allocate for themselves. All runs have the same threads and
allocator settings, with which freed memory goes back to the system at once. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLKVAEVideo

from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.kvae import FAMILY, KVAE, plan_decode, plan_encode

ROOT = Path(__file__).resolve().parents[1]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
# (model, budget to plan for as a fraction of diffusers' peak; 0: the default execution)
RUNS = [("diffusers", 0.0), ("1.0", 0.0), ("2.0-t4s8", 0.0), ("1.0", 0.3), ("2.0-t4s8", 0.13)]


def main() -> None:
    """Print the table, or measure one run in a process that was started for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="17x256x256", help="FRAMESxHEIGHTxWIDTH of the clip (default 17x256x256)")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "DIRECTION", "BUDGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    frames, height, width = map(int, options.size.split("x"))
    if options.run:
        model, direction, budget = options.run
        print(json.dumps(measure(model, direction, int(budget), frames, height, width)))
    else:
        publish(peaks(frames, height, width), None)


def peaks(frames: int, height: int, width: int) -> Iterator[str]:
    """The table, line by line."""
    yield "| | execution | peak, GB | divided by diffusers' |"
    yield "|---|---|---|---|"
    for direction in ("decode", "encode"):
        theirs = 0
        for model, fraction in RUNS:
            run = model, direction, str(int(fraction * theirs))
            command = [sys.executable, "-m", "benchmarks.peak", "--size", f"{frames}x{height}x{width}", "--run", *run]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            peak = found["peak"]
            theirs = theirs or peak
            row = [found["execution"], f"{peak / 1e9:.2f}", f"{peak / theirs:.2f}"]
            yield f"| {model} {direction} | {' | '.join(row)} |"


@torch.no_grad()
def measure(model: str, direction: str, budget: int, frames: int, height: int, width: int) -> dict[str, Any]:
    """Execution and peak, in bytes, of one run. A small run before the measured one loads code and kernels.

    Args:
        model: a name in FAMILY, or "diffusers".
        budget: bytes to plan for; 0: the default execution.
    """
    vae: Any = AutoencoderKLKVAEVideo() if model == "diffusers" else KVAE(FAMILY[model]).fold()
    vae.eval().requires_grad_(False)
    decode = direction == "decode"
    t, h, w = (frames - 1) // 4 + 1, height // 8, width // 8
    source = torch.randn(1, 16, t, h, w) if decode else torch.rand(1, 3, frames, height, width) * 2 - 1
    run, name = getattr(vae, direction), "" if model == "diffusers" else "default"
    if budget:
        plan = plan_decode(vae, source.shape, budget) if decode else plan_encode(vae, source.shape, budget)
        run, name = partial(run, execution=plan.execution), str(plan)
    run(source[..., : source.shape[3] // 4, : source.shape[4] // 4])
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run(source)
    return {"execution": name, "peak": in_use("VmHWM") - before}


def in_use(which: str) -> int:
    """Bytes of this process in memory: VmRSS is the present number, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{which}:")[1].split()[0])


if __name__ == "__main__":
    main()
