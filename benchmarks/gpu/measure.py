"""Seconds and memory of runs on a device. A run that finds no memory has no figures, and the report goes on."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.serving.memory import is_out_of_memory

MOST_ROUNDS = 3
FAILED = "out of memory"
NO_TIME = "no time"

Run = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        seconds: on the clock, until the device is done.
        peak: the most bytes in use, less those that were in use before the run.
    """

    seconds: float
    peak: int

    def __str__(self) -> str:
        return f"{self.seconds:.3f} / {self.peak / 1e9:.2f}"


class Share:
    """A section's share of the time. What begins before its end is measured."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self.end


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """The result of some work; None if memory runs out. Then everything that the work held is freed."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free(device)  # the error is gone, which held the tensors
    return None


def cost_of(run: Run, device: torch.device) -> Cost | None:
    """Run once; None if memory runs out.

    On a GPU the peak is the allocator's. On a CPU it is counted: see `benchmarks.storages`.
    """
    return attempt(partial(_cost_on_gpu if device.type == "cuda" else _cost_on_cpu, run, device), device)


def interleaved(runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, Cost | None]:
    """Median costs of runs that take turns. The first turn warms up; it counts if no other turn fits in `seconds`."""
    start = time.perf_counter()
    first = {name: cost_of(run, device) for name, run in runs.items()}
    rounds = min(MOST_ROUNDS, int(seconds / (time.perf_counter() - start)))
    costs: dict[str, list[Cost | None]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            costs[name].append(cost_of(run, device) if first[name] else None)
    return {name: _median(each or [first[name]]) for name, each in costs.items()}


def free(device: torch.device) -> None:
    """Give memory that is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def shown(cost: Cost | None) -> str:
    """A cost as a cell of a table: seconds / GB."""
    return str(cost) if cost else FAILED


def _cost_on_gpu(run: Run, device: torch.device) -> Cost:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    result = run()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del result
    return Cost(seconds, torch.cuda.max_memory_allocated(device) - before)


def _cost_on_cpu(run: Run, device: torch.device) -> Cost:
    start = time.perf_counter()
    with PeakMemory() as memory:
        run()
    return Cost(time.perf_counter() - start, memory.peak)


def _median(costs: list[Cost | None]) -> Cost | None:
    known = [cost for cost in costs if cost]
    if len(known) < len(costs):
        return None
    return Cost(statistics.median(cost.seconds for cost in known), max(cost.peak for cost in known))
