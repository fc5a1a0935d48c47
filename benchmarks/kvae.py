"""KVAE compared with diffusers' KVAE: seconds, measured in turns in one run, and peak memory.

    python -m benchmarks.kvae                          # prints the tables
    python -m benchmarks.kvae --write docs/results/kvae.md

Memory is counted on the meta device (see `benchmarks.storages`), so any machine can count any size. For one size it is
also measured (see `benchmarks.peak`). Times are medians of interleaved runs of models of full size, with the same
random weights, threads and allocator.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLKVAEVideo, Kandinsky6SRVAE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvae_comfyui.benchmarks.peak import peaks
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.kvae import FAMILY, KVAE, BudgetError, Execution, KVAEConfig, Plan, plan_decode, plan_encode
from kvae_comfyui.kvae.load import official_key

Run = Callable[[Tensor], object]
WHOLE_MAPS = 1 << 50  # bytes of a strip


def main() -> None:
    """Print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each side (default 3)")
    parser.add_argument("--size", default="17x128x128", help="FRAMESxHEIGHTxWIDTH to time (default 17x128x128)")
    parser.add_argument("--only", choices=("seconds", "memory", "peak"), help="print one of the tables only")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    publish(report(options.only, options.rounds, *map(int, options.size.split("x"))), options.write)


def report(only: str | None, rounds: int, frames: int, height: int, width: int) -> Iterator[str]:
    """The tables, line by line."""
    yield "# Performance of kvae/"
    yield ""
    yield f"Printed by `python -m benchmarks.kvae --rounds {rounds}`."
    if only in (None, "seconds"):
        yield ""
        yield f"## Seconds, {frames} frames of {height}x{width}"
        yield ""
        yield f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; rounds: {rounds}."
        yield "The floor is the time that the arithmetic of a run, as the model defines it, needs at the rate of one"
        yield "large convolution on the same machine. A run that needs fewer multiplications can be below it."
        yield ""
        yield "| | diffusers | kvae/ | ratio | floor |"
        yield "|---|---|---|---|---|"
        yield from seconds(rounds, frames, height, width)
    if only in (None, "peak"):
        yield ""
        yield "## Measured peak on a CPU, 17 frames of 256x256, float32"
        yield ""
        yield "How far a process grows during the run (`python -m benchmarks.peak`)."
        yield ""
        yield from peaks(17, 256, 256)
    if only in (None, "memory"):
        yield ""
        yield "## Activations, GB, bf16"
        yield ""
        yield "The first two columns are counted while diffusers and our default execution run. For 2.0-t4s8, which"
        yield "diffusers does not have, its KVAE-3D-1.0 is counted. The last three are the least that `plan_decode` and"
        yield "`plan_encode` offer: exact streams; exact, with or without tiles; blended tiles, which are not exact."
        yield "Weights, latents and the clip are not counted."
        yield ""
        yield "| | diffusers | kvae/ | ratio | least, streamed | least | blended |"
        yield "|---|---|---|---|---|---|---|"
        for size in ((17, 256, 256), (33, 480, 832), (33, 720, 1280)):
            yield from memory(*size)


@torch.no_grad()
def seconds(rounds: int, frames: int, height: int, width: int) -> Iterator[str]:
    """Rows of the table of seconds: KVAE-3D-1.0 against diffusers."""
    ours = KVAE().eval().requires_grad_(False)
    theirs: Any = AutoencoderKLKVAEVideo()
    theirs.eval().requires_grad_(False)
    state = ours.state_dict()
    theirs.load_state_dict({key: state[official_key(key)] for key in theirs.state_dict()})
    x, z = (
        torch.rand(1, 3, frames, height, width) * 2 - 1,
        torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8),
    )
    for dtype in (torch.float32, torch.bfloat16):
        ours.unfold().to(dtype).fold()
        theirs.to(dtype)
        rate = convolution_rate(dtype)
        pairs: list[tuple[str, Tensor, Run, Run]] = [
            ("decode", z.to(dtype), lambda a: theirs.decode(a).sample, ours.decode),
            ("encode", x.to(dtype), lambda a: theirs.encode(a).latent_dist.mode(), ours.encode),
        ]
        for name, source, their_run, our_run in pairs:
            floor = operations(KVAEConfig(), name, source) / rate
            times: list[list[float]] = [[], []]
            for _ in range(rounds):
                for run, out in zip((their_run, our_run), times, strict=True):
                    start = time.perf_counter()
                    run(source)
                    out.append(time.perf_counter() - start)
            a, b = map(statistics.median, times)
            yield f"| 1.0 {name}, {str(dtype)[6:]} | {a:.2f} | {b:.2f} | {a / b:.2f}x | {floor:.2f} |"


def operations(config: KVAEConfig, direction: str, source: Tensor) -> int:
    """Operations of a run with folded resamplers. The meta device uses no faster algorithm for convolutions."""
    with torch.device("meta"):
        run = getattr(KVAE(config).to(source.dtype).requires_grad_(False).fold(), direction)
    with FlopCounterMode(display=False) as flops:
        run(source.to("meta"), Execution(strip_bytes=WHOLE_MAPS))
    return flops.get_total_flops()


def convolution_rate(dtype: torch.dtype) -> float:
    """Operations per second of one large 3x3x3 convolution, the best of five runs."""
    x, weight = torch.randn(1, 256, 8, 48, 48, dtype=dtype), torch.randn(256, 256, 3, 3, 3, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        y = F.conv3d(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * y.numel() * weight[0].numel() / best


@torch.no_grad()
def memory(frames: int, height: int, width: int) -> Iterator[str]:
    """Rows of the table of activations, for one size of clip."""
    for name, config in FAMILY.items():
        twin = on_meta(Kandinsky6SRVAE if name == "2.0-t4s16" else AutoencoderKLKVAEVideo)
        kvae, side = on_meta(partial(KVAE, config)).fold(), config.spatial_factor
        x = torch.empty(1, 3, frames, height, width, dtype=torch.bfloat16, device="meta")
        t, h, w = (frames - 1) // config.temporal_compress_times + 1, height // side, width // side
        z = torch.empty(1, config.z_channels, t, h, w, dtype=torch.bfloat16, device="meta")
        for direction, source, run, plan in (
            ("decode", z, kvae.decode_stream, plan_decode),
            ("encode", x, kvae.encode_stream, plan_encode),
        ):
            theirs = count(getattr(twin, direction), source)
            peak = count(exhaust, run, source)
            choices: list[dict[str, bool]] = [{"stream": True}, {}, {"approximate": True}]
            least = [f"{least_of(plan, kvae, source, **choice):.2f}" for choice in choices]
            row = [f"{theirs:.2f}", f"{peak:.2f}", f"{peak / theirs:.2f}", *least]
            yield f"| {name} {direction}, {frames}x{height}x{width} | {' | '.join(row)} |"


def on_meta(make: Callable[[], Any]) -> Any:
    """A frozen model in bfloat16 on the meta device, which holds no weights."""
    with torch.device("meta"):
        return make().to(torch.bfloat16).requires_grad_(False)


def least_of(plan: Callable[..., Plan], kvae: KVAE, source: Tensor, **choice: bool) -> float:
    """GB of the plan that needs the least memory."""
    try:
        return plan(kvae, source.shape, 0, **choice).peak / 1e9
    except BudgetError as error:
        return error.least.peak / 1e9


def exhaust(run: Callable[..., Iterable[object]], *args: object) -> None:
    """Run a stream to its end and drop its pieces."""
    for _ in run(*args):
        pass


def count(run: Callable[..., object], *args: object) -> float:
    """Peak of the storages that are alive during a run, in GB."""
    with PeakMemory() as counter:
        run(*args)
    return counter.peak / 1e9


if __name__ == "__main__":
    main()
