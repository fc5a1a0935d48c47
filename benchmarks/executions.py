"""What the executions of computing a clip take, the source of the costs that `kvae.engine.plan` orders them by.

    python -m benchmarks.executions           # prints the table

Models of full size with random weights, float32, 17 frames of 128x128: seconds, the medians of interleaved runs, and
the peak of the storages that were made meanwhile.
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
EXECUTIONS = [Execution(recompute=level) for level in Recompute] + [Execution(strip_bytes=16 << 20)]
SHORT = [Execution(segment=8), Execution(segment=4)]  # of 2.0 alone


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each execution (default 3)")
    publish(table(parser.parse_args().rounds), None)


@torch.no_grad()
def table(rounds: int) -> Iterator[str]:
    """Its rows."""
    yield "| | segment | strips, MB | recompute | seconds | of the first | GB |"
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
                row = [execution.segment, execution.strip_bytes >> 20, execution.recompute.name.lower()]
                figures = f"{seconds:.1f} | {seconds / first:.2f} | {results[0][1] / 1e9:.2f}"
                yield f"| {model} {direction} | {' | '.join(map(str, row))} | {figures} |"


def run(kvae: KVAE, direction: str, source: torch.Tensor, execution: Execution) -> tuple[float, int]:
    """Seconds, and bytes at the peak."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        exhaust(getattr(kvae, f"{direction}_stream"), source, execution)
    return time.perf_counter() - start, memory.peak


if __name__ == "__main__":
    main()
