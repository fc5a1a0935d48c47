"""Choose how to compute a clip within a memory budget, by adding up beforehand what `kvae.engine.strips` will hold.

plan = plan_decode(kvae, z.shape, budget=6_000_000_000)
print(plan)                                # segments of 16 frames, strips of 64 MB, …: 5.8 GB
video = kvae.decode(z, plan.execution)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ..coders import Coder
from ..config import SEGMENT_FRAMES
from ..frames import padded_frames
from ..model import KVAE
from .count import Count
from .strips import Execution, tail_frames
from .tiles import Tiling, blended_tiling, exact_tiling

STRIP_BYTES = (256 << 20, 64 << 20, 16 << 20)
# Of `Execution.recompute`, decoding and encoding, as benchmarks/executions.py measures it, less what strips cost
RECOMPUTE_COST = {
    ("group", True): (1.0, 1.3, 2.1, 3.0),
    ("group", False): (1.0, 1.05, 1.6, 1.9),
    ("rms", True): (1.0, 1.1, 1.3, 1.35),
    ("rms", False): (1.0, 1.01, 1.05, 1.1),
}
MOST_TILES = 4  # along an axis
MOST_BLENDED = 8
OVERLAP = 8  # latents; see docs/kvae.md for the error that is left
MARGIN = 1.03  # small tensors that are not counted; measured on small and published widths, see docs/kvae.md


@dataclass(frozen=True)
class Plan:
    """An execution, and the most bytes that it is going to hold."""

    execution: Execution
    peak: int

    def __str__(self) -> str:
        again = ("", ", upsampled maps again", ", upsampled and inner maps again", ", all of full resolution again")
        rows, columns = self.execution.tiles
        blended = (
            "" if self.execution.overlap is None else f" that blend over {self.execution.overlap} latents (not exact)"
        )
        tiled = f"{rows}x{columns} tiles{blended}, " if rows * columns > 1 else ""
        return (
            f"{tiled}segments of {self.execution.segment} frames, strips of {self.execution.strip_bytes >> 20} MB"
            f"{again[self.execution.recompute]}: {self.peak / 1e9:.2f} GB"
        )


class BudgetError(ValueError):
    """Nothing fits the budget; `least` is the plan that comes nearest."""

    def __init__(self, budget: int, least: Plan):
        super().__init__(
            f"the budget is {budget / 1e9:.2f} GB; the least memory this takes is {least.peak / 1e9:.2f} GB "
            "beside the weights: give more, or a smaller picture"
        )
        self.least = least


def plan_decode(
    kvae: KVAE, z_shape: Sequence[int], budget: int | None = None, stream: bool = False, approximate: bool = False
) -> Plan:
    """The fastest way to decode latents of shape [B, c, t, h, w] within `budget` bytes; exact, where one fits.

    Args:
        stream: for `decode_stream`, which does not take tiles.
        approximate: whether blended tiles will do where nothing exact fits.

    Raises:
        BudgetError: there is none.
        ValueError: it is not a shape of latents.
    """
    _check_shape(z_shape)
    return _plan(kvae, kvae.decoder, z_shape, 1, budget, stream, approximate)


def plan_encode(
    kvae: KVAE, x_shape: Sequence[int], budget: int | None = None, stream: bool = False, approximate: bool = False
) -> Plan:
    """The fastest way to encode pixels of shape [B, 3, T, H, W] within `budget` bytes; exact, where one fits.

    Args:
        stream: for `encode_stream`, which does not take tiles.
        approximate: whether blended tiles will do where nothing exact fits.

    Raises:
        BudgetError: there is none.
        ValueError: it is not a shape of pixels.
    """
    _check_shape(x_shape)
    side, cadence = kvae.config.spatial_factor, kvae.config.temporal_compress_times
    B, C, T, H, W = x_shape
    shape = B, C, padded_frames(T, cadence), side * -(-H // side), side * -(-W // side)
    return _plan(kvae, kvae.encoder, shape, side, budget, stream, approximate)


def _plan(
    kvae: KVAE, coder: Coder, shape: Sequence[int], side: int, budget: int | None, stream: bool, approximate: bool
) -> Plan:
    """For a source [B, C, T, H, W] of so many rows and columns per latent."""
    B, _, T, H, W = shape
    decode = coder is kvae.decoder
    h, w = H // side, W // side

    def peak(execution: Execution, tiling: Tiling) -> int:
        count = Count(kvae, coder, execution, B)
        rows, columns = (n * side for n in tiling.largest)
        length = execution.segment // (kvae.config.temporal_compress_times if decode else 1)
        kinds, tiled = _lengths(T, length), len(tiling) > 1
        most = max(count.segment(n, rows, columns, *ends, tiled) for n, ends in kinds)
        if tiled and not decode and not kvae.config.per_position:  # two segments of the smaller version of the picture
            most += 2 * count.unit * 3 * (length + 1) * rows * columns
        return int(MARGIN * most)

    plans = []
    for overlap in (None, OVERLAP) if approximate and not stream else (None,):
        tilings = _tilings(kvae, h, w, decode, stream, overlap)
        for execution in _executions(kvae, coder, tilings, overlap):
            plans.append(Plan(execution, peak(execution, tilings[execution.tiles])))
            if budget is None or plans[-1].peak <= budget:
                return plans[-1]
    raise BudgetError(budget, min(plans, key=lambda plan: plan.peak))  # type: ignore[arg-type]


def _tilings(
    kvae: KVAE, h: int, w: int, decode: bool, stream: bool, overlap: int | None
) -> dict[tuple[int, int], Tiling]:
    """The tiles to choose from, by how many rows and columns of them there are."""
    if overlap is not None:  # about square ones: nothing is gained by others
        counts = {(-(-n * h // max(h, w)), -(-n * w // max(h, w))) for n in range(2, MOST_BLENDED + 1)}
        return {count: blended_tiling(h, w, count, overlap) for count in sorted(counts)}
    most = MOST_TILES if kvae.config.per_position and not stream else 1
    pairs = product(range(1, most + 1), range(1, most + 1))
    return {count: exact_tiling(kvae.config, h, w, count, decode) for count in pairs}


def _executions(
    kvae: KVAE, coder: Coder, tilings: dict[tuple[int, int], Tiling], overlap: int | None
) -> list[Execution]:
    """All there are for these tiles, from the fastest on."""
    config, blocks = kvae.config, len(coder.full_resolution())
    cadence = config.temporal_compress_times
    segments = (SEGMENT_FRAMES, 2 * cadence, cadence) if config.per_position else (SEGMENT_FRAMES,)
    choices = product(segments, STRIP_BYTES, range(4))
    executions = [Execution(*choice, count, overlap) for choice in choices for count in tilings]
    reach = tail_frames(len(kvae.decoder.full_resolution()))
    row = 3 * config.decoder_widths[0] * kvae.decoder.conv_out.conv.weight.element_size() * config.spatial_factor

    def cost(execution: Execution) -> float:
        tiling = tilings[execution.tiles]
        rows = execution.strip_bytes / (row * tiling.largest[1] * execution.segment)
        halo = 1 + 2 * blocks * (execution.recompute > 2)  # those of all blocks, where they are computed at once
        again = RECOMPUTE_COST[config.norm, coder is kvae.decoder][execution.recompute]
        short = 1 + 0.05 * segments.index(execution.segment)
        return again * (1 + halo / rows) * short * tiling.work

    return sorted((m for m in executions if m.recompute < 3 or m.segment >= reach), key=cost)


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 5 or min(shape) < 1:
        raise ValueError(f"the shape is {list(shape)}; expected five sides of at least 1: batch, channels, T, H, W")


def _lengths(total: int, rest: int) -> list[tuple[int, tuple[bool, bool]]]:
    """(length, (is the first, is the last)) of the kinds of segment that a clip is cut into."""
    if total <= rest + 1:
        return [(total, (True, True))]
    more = total - rest - 1
    kinds = [(rest + 1, (True, False)), (more % rest or rest, (False, True))]
    return [*kinds, (rest, (False, False))] if more > rest else kinds
