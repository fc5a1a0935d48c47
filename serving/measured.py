"""How much memory a card really takes for each byte that a plan counts: learned from the card itself.

A plan counts tensors. It cannot know what the convolution library allocates while it runs, nor how the allocator
rounds. So the peak of a first segment is compared with what was counted for it, and the ratio corrects later plans. It
is kept for the process, for each device, dtype, model and direction. The counters are the allocator's own, on the host:
nothing waits for the card. On devices without a `Meter`, such as a CPU, the ratio remains `WORKSPACE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

import torch

from ..kvae import KVAEConfig, Plan

Case = tuple[torch.device, torch.dtype, KVAEConfig, Callable[..., Plan]]  # the last: plan_decode or plan_encode

WORKSPACE = 1.1  # bytes granted for each byte counted until something is measured; a guess
MARGIN = 1.05  # on a measured ratio: other plans, and later segments, do not take exactly the same. A guess
LEAST_BYTES = 256 << 20  # below, a workspace of constant size would pass for a large ratio
MOST = 3.0  # above, something else used the card at the same time


class Meter(Protocol):
    """Follows the memory in use on one device."""

    def start(self) -> None:
        """Begin to measure."""

    def growth(self) -> int:
        """The most bytes in use at a time since `start`, less those in use at `start`."""


class CudaMeter:
    """The counters of PyTorch's allocator for one CUDA device. `start` resets its peak for everyone who reads it."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def growth(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


def meter_of(device: torch.device) -> Meter | None:
    """The meter of a device, or None where there is none."""
    return CudaMeter(device) if device.type == "cuda" else None


class Ratios:
    """The ratios of bytes taken to bytes counted. Any number of threads may use one object.

    Args:
        meter: makes the meter of a device, or returns None.
    """

    def __init__(self, meter: Callable[[torch.device], Meter | None] = meter_of):
        self._meter = meter
        self._measuring = Lock()
        self._learned: dict[Case, float] = {}

    def __deepcopy__(self, memo: dict) -> Ratios:
        return self  # a copy of a VAE runs on the same card

    def of(self, case: Case) -> float:
        """Bytes to grant for each byte counted; at least 1."""
        learned = self._learned.get(case)
        return WORKSPACE if learned is None else MARGIN * learned

    @contextmanager
    def measured(self, case: Case, counted: int) -> Iterator[None]:
        """Measure what runs inside, for which `counted` bytes were counted, and learn from it.

        Nothing is learned if less than LEAST_BYTES are counted, if it fails, or while another thread measures.
        """
        meter = self._meter(case[0]) if counted >= LEAST_BYTES else None
        if meter is None or not self._measuring.acquire(blocking=False):
            yield
            return
        try:
            meter.start()
            yield
            self._learn(case, meter.growth() / counted)
        finally:
            self._measuring.release()

    def _learn(self, case: Case, ratio: float) -> None:
        """A higher ratio counts at once, a lower one by half: too little memory costs more than a slower plan.

        Below 1, the plan was cautious for this clip, and may not be for the next one.
        """
        if ratio <= MOST:
            ratio = max(1.0, ratio)
            self._learned[case] = max(ratio, (self._learned.get(case, ratio) + ratio) / 2)


RATIOS = Ratios()  # of this process
