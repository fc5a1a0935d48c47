"""The way down when memory runs out: each plan needs clearly less than the one that failed.

ladder = planner.ladder(plan_decode, z.shape)
for part in with_less_memory(partial(work, ladder), ladder.step_down):    # work computes with `ladder.execution`
    ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ..kvae import BudgetError, Execution, Plan

T = TypeVar("T")
logger = logging.getLogger(__name__)

STEP = 0.7  # the share of a failed plan's memory that the next one may need


class Search(Protocol):
    """Finds the fastest plan within `most` counted bytes. Raises a BudgetError with the least plan if none fits."""

    def __call__(self, most: int, *, stream: bool, approximate: bool) -> Plan: ...


def empty_cache() -> None:
    """Give the memory that PyTorch keeps for later back to the card."""
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@dataclass
class Ladder:
    """The plan for all clips of one decode or encode, and the smaller plans below it.

    After a failure comes the fastest plan that needs at most STEP of the failed one's memory, and in the end the exact
    plan that needs least. If `approximate`, blended tiles are below that. Of clips that may be short of memory, they
    are several times faster than the exact plan above them, by the planner's estimate: tiles share a few latents only,
    and recompute less, or nothing. A later clip begins where the one before arrived.

    Attributes:
        plan: the present plan.
        search: finds smaller ones. None: there are none, as for tiles that a host asked for.
        make_room: called before a smaller plan is tried.
        counted: returns how many bytes a plan may count, as is known by now; None if there is no limit.
        measured: makes a context in which what a plan takes is measured.
    """

    plan: Plan
    search: Search | None = None
    stream: bool = False
    approximate: bool = False
    make_room: Callable[[], None] = empty_cache
    counted: Callable[[], int | None] = lambda: None
    measured: Callable[[int], AbstractContextManager[None]] = lambda counted: nullcontext()

    def execution(self) -> Execution:
        """How to compute the next segment. The engine asks before each."""
        return self.plan.execution

    def step_down(self) -> Plan | None:
        """Take the next smaller plan, and make room for it. None: there is none, and the present one stays."""
        smaller = self._smaller()
        if smaller:
            self.plan = smaller
            self.make_room()
        return smaller

    def watch(self, segments: Iterator[T]) -> Iterator[T]:
        """The same segments of a clip. The first is measured; the rest is computed in less if that turns out too much.

        Nothing is measured with tiles: a plan's first segment then is not all that is computed before the first result.
        """
        whole = self.plan.execution.tiles == (1, 1)
        with self.measured(self.plan.first) if whole else nullcontext():
            segment = next(segments, None)
        if whole:
            self._fit()
        while segment is not None:
            yield segment
            segment = None  # before the next one is made
            segment = next(segments, None)

    def _smaller(self) -> Plan | None:
        if self.search is None:
            return None
        exact = self.plan.execution.overlap is None
        for approximate in [False] * exact + [True] * self.approximate:
            try:
                found = self.search(int(STEP * self.plan.peak), stream=self.stream, approximate=approximate)
            except BudgetError as error:
                found = error.least
            if found.peak < self.plan.peak:
                return found
        return None

    def _fit(self) -> None:
        """Take a smaller plan if the present one does not fit: one that can go on in the middle of a clip."""
        most = self.counted()
        if self.search is None or most is None or self.plan.peak <= most:
            return
        segment = self.plan.execution.segment
        with suppress(BudgetError):  # then the present plan stays: memory may suffice after all
            found = self.search(most, stream=True, approximate=False)
            while found.execution.segment != segment:
                found = self.search(found.peak - 1, stream=True, approximate=False)
            self.plan = found
            logger.info("More memory is taken than was counted; going on with %s", found)
