"""Choose how a HostVAE computes a clip within the memory that the host grants.

`kvae.engine.plan` counts the tensors of a computation. WORKSPACE adds what the convolution library allocates; all bytes
here include it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..kvae import KVAE, BudgetError, Execution, Plan, plan_decode

PlanFunction = Callable[..., Plan]  # plan_decode or plan_encode
Executions = tuple[Callable[[], Execution], ...]  # to try in turn

WORKSPACE = 1.1  # an allowance: bytes granted for each byte counted
MOST_TILE = 512  # latents: 4096 pixels


@dataclass
class Planner:
    """Plans for one KVAE, which computes the clips of a batch one after the other.

    In all methods `plan` is `plan_decode` or `plan_encode`, `shape` is that of the latents or pixels, and `stream`
    excludes tiles.

    Args:
        free_memory: returns the bytes that are free for activations, or None if there is no limit. The fastest
            execution within them is used; if none fits, the one that needs least.
        budget: bytes that activations may use; replaces `free_memory`. If nothing fits, a BudgetError is raised.
        approximate: whether to use blended tiles if nothing exact fits; not in streams.
    """

    kvae: KVAE
    free_memory: Callable[[], int | None] = lambda: None
    budget: int | None = None
    approximate: bool = False
    _last: tuple[tuple, Plan] | None = field(default=None, init=False)  # hosts ask for its bytes, then for it

    def memory(self, plan: PlanFunction, shape: Sequence[int], dtype: torch.dtype, stream: bool = False) -> float:
        """Bytes that a clip needs in addition to the weights, within the budget, with weights in `dtype`.

        Raises:
            BudgetError: nothing fits the budget.
        """
        return self._in_dtype(self._within(plan, shape, self.budget, stream), dtype)

    def executions(self, plan: PlanFunction, shape: Sequence[int], stream: bool = False) -> Executions:
        """The execution to use, and the one to use if memory runs out. Each, when called, may raise a BudgetError."""
        return partial(self._execution, plan, shape, stream), lambda: self._least(plan, shape, 0, stream).execution

    def tiles(
        self, plan: PlanFunction, shape: Sequence[int], tile: tuple[int, int], overlap: int, side: int
    ) -> Execution:
        """An execution by tiles of at most `tile` latents, blended over at least `overlap` latents.

        Args:
            side: rows of `shape` per latent: 1 to decode.

        Raises:
            ValueError: the overlap is as large as a tile.
            BudgetError: nothing fits the budget.
        """
        sides = [n // side for n in shape[3:]]
        rows, columns = (tile_count(n, t, overlap) for n, t in zip(sides, tile, strict=True))
        largest = (side * min(n, t) for n, t in zip(sides, tile, strict=True))
        execution = self._execution(plan, (*shape[:3], *largest), stream=True)
        return replace(execution, tiles=(rows, columns), overlap=overlap)

    def preferred_decode_tile(self, free_memory: float, dtype: torch.dtype) -> int:
        """The side, in latents, of the largest square tile that decodes in half of `free_memory` bytes."""
        side = 0
        while side < MOST_TILE:
            shape = 1, 1, 13, side + 8, side + 8
            if self._in_dtype(self._within(plan_decode, shape, None, False), dtype) > free_memory / 2:
                break
            side += 8
        return side

    def _execution(self, plan: PlanFunction, shape: Sequence[int], stream: bool) -> Execution:
        if self.budget is not None:
            return self._within(plan, shape, self.budget, stream).execution
        free, fastest = self.free_memory(), self._within(plan, shape, None, stream)
        if free is None or fastest.peak <= _counted(free):
            return fastest.execution
        # plans count cautiously, so that the least may fit after all; if it does not, hosts fall back to tiles
        return self._least(plan, shape, free, stream).execution

    def _within(self, plan: PlanFunction, shape: Sequence[int], budget: int | None, stream: bool) -> Plan:
        """The fastest plan within `budget` bytes; None is no limit. The last plan is kept."""
        weight = next(self.kvae.parameters())
        key = plan, _one_clip(shape), budget, stream, self.approximate, weight.dtype, weight.device
        if self._last is None or self._last[0] != key:
            self._last = key, self._search(plan, shape, budget, stream)
        return self._last[1]

    def _least(self, plan: PlanFunction, shape: Sequence[int], free: int, stream: bool) -> Plan:
        """The fastest plan within `free` bytes; if none fits, the one with the lowest peak."""
        try:
            return self._search(plan, shape, free, stream)
        except BudgetError as error:
            return error.least

    def _search(self, plan: PlanFunction, shape: Sequence[int], budget: int | None, stream: bool) -> Plan:
        counted = None if budget is None else _counted(budget)
        try:
            return plan(self.kvae, _one_clip(shape), counted, stream=stream, approximate=self.approximate)
        except BudgetError as error:
            least = replace(error.least, peak=int(WORKSPACE * error.least.peak) + 1)
            raise BudgetError(budget, least) from None  # type: ignore[arg-type]

    def _in_dtype(self, plan: Plan, dtype: torch.dtype) -> float:
        """The bytes of a plan, which counts in the dtype of the weights, for weights in another dtype."""
        return WORKSPACE * plan.peak * dtype.itemsize / next(self.kvae.parameters()).dtype.itemsize


def tile_count(n: int, tile: int, overlap: int) -> int:
    """The number of tiles of at most `tile` latents that cover n latents and overlap by at least `overlap`.

    Raises:
        ValueError: the overlap is as large as a tile.
    """
    if tile >= n >= 1:
        return 1
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(
            f"tiles of {tile} latents that overlap by {overlap}; expected larger tiles, or a smaller overlap"
        )
    return -(-(n - overlap) // (tile - overlap))


def _counted(budget: int) -> int:
    """The part of a budget, in bytes, that counted tensors may fill."""
    return int(budget / WORKSPACE)


def _one_clip(shape: Sequence[int]) -> tuple[int, ...]:
    """[1, 1, t, h, w] of one clip. Hosts ask for the memory of any latent before it is refused, even of an empty or a
    4-D one: missing sides count as 1."""
    return 1, 1, *(max(1, side) for side in (1, 1, 1, *shape)[-3:])
