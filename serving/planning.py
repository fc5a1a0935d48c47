"""Choose how a HostVAE computes clips within the memory that the host grants.

`kvae.engine.plan` counts the tensors of a computation. A ratio adds what it cannot count (see `.measured`); all bytes
here include it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..adapters.adapter import LatentAdapter
from ..kvae import KVAE, BudgetError, Plan, plan_decode, plan_encode
from ..kvae.engine.count import Conversion
from .ladder import Ladder, empty_cache
from .measured import RATIOS, Case, Ratios
from .memory import free_memory

PlanFunction = Callable[..., Plan]  # plan_decode or plan_encode

MOST_TILE = 512  # latents: 4096 pixels


@dataclass
class Planner:
    """Plans for one KVAE, which computes the clips of a batch one after the other.

    In all methods `plan` is `plan_decode` or `plan_encode`, `shape` is that of KVAE's latents or pixels, `stream`
    excludes tiles, and `held` is how many bytes the caller holds on the device beside the activations. A budget
    excludes them.

    Args:
        free_memory: returns the bytes that are free for activations, or None if there is no limit. The fastest
            execution within them is used; if none fits, the one that needs least.
        budget: bytes that activations may use; replaces `free_memory`. If nothing fits, a BudgetError is raised.
        approximate: whether to use blended tiles if nothing exact fits; not in streams.
        make_room: frees memory that others hold, after memory has run out and before a smaller plan is tried.
        device: where the KVAE will compute. None: where its weights are.
        ratios: how many bytes are taken for each byte counted.
        adapters: the adapter that works before decoding, and after encoding, if there is one; by PlanFunction.
    """

    kvae: KVAE
    free_memory: Callable[[], int | None] = lambda: None
    budget: int | None = None
    approximate: bool = False
    make_room: Callable[[], None] = empty_cache
    device: torch.device | None = None
    ratios: Ratios = RATIOS
    adapters: dict[PlanFunction, LatentAdapter] = field(default_factory=dict)
    _last: tuple[tuple, Plan] | None = field(default=None, init=False)  # hosts ask for its bytes, then for it

    def limit(self, memory_gb: float) -> None:
        """Plan for so many GB; 0 is what is free on the GPU that holds the weights by then, and no limit elsewhere."""
        self.budget = round(memory_gb * 1e9) or None
        self.free_memory = lambda: free_memory(next(self.kvae.parameters()).device)

    def memory(
        self, plan: PlanFunction, shape: Sequence[int], dtype: torch.dtype, stream: bool = False, held: int = 0
    ) -> float:
        """Bytes that a clip needs in addition to the weights, within the budget, with weights in `dtype`.

        Raises:
            BudgetError: nothing fits the budget.
        """
        return self._in_dtype(plan, self._within_budget(plan, shape, stream), dtype) + held

    def ladder(self, plan: PlanFunction, shape: Sequence[int], stream: bool = False, held: int = 0) -> Ladder:
        """The plan for clips of this shape, and the smaller ones below it, for one decode or encode.

        The free memory is asked for here, once: the weights and the result must be in their places.

        Raises:
            BudgetError: nothing fits the budget.
        """
        free = self.free_memory() if self.budget is None else None
        room = self.budget if free is None else free - held

        def counted() -> int | None:
            return None if room is None else self._counted(plan, room)

        return Ladder(
            self._first(plan, shape, stream, counted()),
            partial(plan, self.kvae, _one_clip(shape), device=self.device, conversion=self._conversion(plan, shape)),
            stream,
            self.approximate,
            self.make_room,
            counted,
            partial(self.ratios.measured, self._case(plan)),
        )

    def tiles(
        self, plan: PlanFunction, shape: Sequence[int], tile: tuple[int, int], overlap: int, side: int, held: int = 0
    ) -> Ladder:
        """Tiles of at most `tile` latents, blended over at least `overlap` latents, with no smaller plan below them.

        Args:
            side: rows of `shape` per latent: 1 to decode.

        Raises:
            ValueError: the overlap is as large as a tile.
            BudgetError: nothing fits the budget.
        """
        sides = [n // side for n in shape[3:]]
        rows, columns = (tile_count(n, t, overlap) for n, t in zip(sides, tile, strict=True))
        largest = (side * min(n, t) for n, t in zip(sides, tile, strict=True))
        one = self.ladder(plan, (*shape[:3], *largest), stream=True, held=held).plan
        return Ladder(replace(one, execution=replace(one.execution, tiles=(rows, columns), overlap=overlap)))

    def preferred_decode_tile(self, free_memory: float, dtype: torch.dtype) -> int:
        """The side, in latents, of the largest square tile that decodes in half of `free_memory` bytes."""
        side = 0
        while side < MOST_TILE:
            shape = 1, 1, 13, side + 8, side + 8
            if self._in_dtype(plan_decode, self._within(plan_decode, shape, None, False), dtype) > free_memory / 2:
                break
            side += 8
        return side

    def _first(self, plan: PlanFunction, shape: Sequence[int], stream: bool, counted: int | None) -> Plan:
        """The plan to begin with, where a plan may count `counted` bytes."""
        fastest = self._within_budget(plan, shape, stream)
        if counted is None or fastest.peak <= counted:
            return fastest
        try:
            return self._within(plan, shape, counted, stream)
        except BudgetError as error:
            # plans count cautiously, so that the least may fit after all; if it does not, hosts fall back to tiles
            return error.least

    def _within_budget(self, plan: PlanFunction, shape: Sequence[int], stream: bool) -> Plan:
        """The fastest plan within the budget, if there is one."""
        if self.budget is None:
            return self._within(plan, shape, None, stream)
        try:
            return self._within(plan, shape, self._counted(plan, self.budget), stream)
        except BudgetError as error:
            least = replace(error.least, peak=int(self._ratio(plan) * error.least.peak) + 1)
        raise BudgetError(self.budget, least)

    def _within(self, plan: PlanFunction, shape: Sequence[int], counted: int | None, stream: bool) -> Plan:
        """The fastest plan within `counted` bytes; None is no limit. The last plan is kept."""
        weight = next(self.kvae.parameters())
        device = self.device or weight.device
        key = plan, _one_clip(shape), counted, stream, self.approximate, weight.dtype, device
        if self._last is None or self._last[0] != key:
            clip = self.kvae, _one_clip(shape), counted, stream, self.approximate, device
            self._last = key, plan(*clip, self._conversion(plan, shape))
        return self._last[1]

    def _conversion(self, plan: PlanFunction, shape: Sequence[int]) -> Conversion:
        """What the adapter takes to convert one clip of this shape."""
        if plan not in self.adapters:
            return Conversion()
        *_, t, h, w = _one_clip(shape)
        adapter, side = self.adapters[plan], self.kvae.config.spatial_factor
        if plan is plan_encode:
            rate = self.kvae.config.temporal_compress_times
            t, h, w = (t - 1) // rate + 1, -(-h // side), -(-w // side)
        else:
            h, w = (n * side // adapter.source.spatial_factor for n in (h, w))
        return adapter.conversion(t, h, w, next(self.kvae.parameters()).dtype)

    def _case(self, plan: PlanFunction) -> Case:
        weight = next(self.kvae.parameters())
        return self.device or weight.device, weight.dtype, self.kvae.config, plan

    def _ratio(self, plan: PlanFunction) -> float:
        return self.ratios.of(self._case(plan))

    def _counted(self, plan: PlanFunction, room: int) -> int:
        """The part of `room` bytes that counted tensors may fill."""
        return int(room / self._ratio(plan))

    def _in_dtype(self, plan: PlanFunction, planned: Plan, dtype: torch.dtype) -> float:
        """The bytes of a plan, which counts in the dtype of the weights, for weights in another dtype."""
        return self._ratio(plan) * planned.peak * dtype.itemsize / next(self.kvae.parameters()).dtype.itemsize


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


def _one_clip(shape: Sequence[int]) -> tuple[int, ...]:
    """[1, 1, t, h, w] of one clip. Hosts ask for the memory of any latent before it is refused, even of an empty or a
    4-D one: missing sides count as 1."""
    return 1, 1, *(max(1, side) for side in (1, 1, 1, *shape)[-3:])
