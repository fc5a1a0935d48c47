"""Time and memory of executions. `kvae.engine.plan` orders executions by these times (RECOMPUTE_COST).

    python -m benchmarks.executions           # prints the table

Models have full size and random weights, in float32; the clip has 17 frames of 128x128. Seconds are medians of
interleaved runs; GB are the peak of the storages that are alive at one time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

from kvae_comfyui.benchmarks.kvae import exhaust
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.kvae import FAMILY, KVAE, Execution, Recompute

MODELS = ("1.0", "2.0-t4s8")
STRIPS = 64  # MB
CPU = torch.device("cpu")
EXECUTIONS = [Execution(strip_bytes=STRIPS << 20, recompute=level) for level in Recompute]
EXECUTIONS += [Execution(strip_bytes=16 << 20)]
SHORT = [Execution(segment, STRIPS << 20) for segment in (8, 4)]  # for 2.0 only


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each execution (default 3)")
    publish(rows(parser.parse_args().rounds), None)


@torch.no_grad()
def rows(rounds: int) -> Iterator[str]:
    """The rows of the table; *relative* is the time divided by that of the first execution."""
    yield "| | segment | strips, MB | recompute | seconds | relative | GB |"
    yield "|---|---|---|---|---|---|---|"
    for model in MODELS:
        kvae = KVAE(FAMILY[model]).eval().requires_grad_(False).fold()
        sources = {"decode": torch.randn(1, 16, 5, 16, 16), "encode": torch.rand(1, 3, 17, 128, 128) * 2 - 1}
        for direction, source in sources.items():
            executions = EXECUTIONS + (SHORT if kvae.config.norm_is_per_position else [])
            runs = [[run(kvae, direction, source, execution) for execution in executions] for _ in range(rounds)]
            first = 0.0
            for execution, results in zip(executions, zip(*runs, strict=True), strict=True):
                seconds = statistics.median(result[0] for result in results)
                first = first or seconds
                row = [execution.segment, execution.strip_bytes_on(CPU) >> 20, execution.recompute.name.lower()]
                measured = f"{seconds:.1f} | {seconds / first:.2f} | {results[0][1] / 1e9:.2f}"
                yield f"| {model} {direction} | {' | '.join(map(str, row))} | {measured} |"


def run(kvae: KVAE, direction: str, source: torch.Tensor, execution: Execution) -> tuple[float, int]:
    """Seconds of a run, and its peak in bytes."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        exhaust(getattr(kvae, f"{direction}_stream"), source, execution)
    return time.perf_counter() - start, memory.peak


if __name__ == "__main__":
    main()
