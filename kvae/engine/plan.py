"""Choose how to compute a clip within a memory budget, by adding up beforehand the memory that each execution needs.

plan = plan_decode(kvae, z.shape, budget=6_000_000_000)
print(plan)                                # 16-frame segments, 64 MB strips, …; peak 5.80 GB
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
from .count import clip_bytes
from .execution import Execution, Recompute, frames_to_recompute
from .tiles import Tiling, blended_tiling, exact_tiling

STRIP_BYTES = (256 << 20, 64 << 20, 16 << 20)
# Relative time of each level of `Recompute`, by (norm, whether it decodes): measured by benchmarks/executions.py, less
# the cost of the strips
RECOMPUTE_COST = {
    ("group", True): (1.0, 1.3, 2.1, 3.0),
    ("group", False): (1.0, 1.05, 1.6, 1.9),
    ("rms", True): (1.0, 1.1, 1.3, 1.35),
    ("rms", False): (1.0, 1.01, 1.05, 1.1),
}
RECOMPUTE_WORDS = {
    Recompute.NOTHING: "",
    Recompute.UPSAMPLED: ", recomputing upsampled feature maps",
    Recompute.INNER: ", recomputing upsampled and inner feature maps",
    Recompute.FULL_RESOLUTION: ", recomputing all feature maps of full resolution",
}
MOST_TILES = 4  # exact tiles along an axis
MOST_BLENDED = 8  # blended tiles along the longer axis
OVERLAP = 8  # latents that blended tiles share; docs/kvae.md has the error that remains
# For small tensors that are not counted. Counted and measured peaks were compared for small models and for the
# published widths (tests/kvae/engine/test_plan.py, which fails if a plan is too low)
MARGIN = 1.03


@dataclass(frozen=True)
class Plan:
    """An execution, and the most bytes that it needs in addition to the weights.

    Attributes:
        first: the most bytes that the first segment alone needs.
    """

    execution: Execution
    peak: int
    first: int

    def __str__(self) -> str:
        execution = self.execution
        rows, columns = execution.tiles
        blended = "" if execution.overlap is None else f" blended over {execution.overlap} latents (not exact)"
        tiles = f"{rows}x{columns} tiles{blended}, " if rows * columns > 1 else ""
        return (
            f"{tiles}{execution.segment}-frame segments, {execution.strip_bytes >> 20} MB strips"
            f"{RECOMPUTE_WORDS[execution.recompute]}; peak {self.peak / 1e9:.2f} GB"
        )


class BudgetError(ValueError):
    """Nothing fits the budget. `least` is the plan that needs the least memory."""

    def __init__(self, budget: int, least: Plan):
        approximate = "" if least.execution.overlap else ", or turn on approximate tiles if there is such an option"
        super().__init__(
            f"this clip needs at least {least.peak / 1e9:.2f} GB in addition to the weights, but the budget is "
            f"{budget / 1e9:.2f} GB; raise the budget, lower the resolution{approximate}"
        )
        self.least = least


def plan_decode(
    kvae: KVAE, z_shape: Sequence[int], budget: int | None = None, stream: bool = False, approximate: bool = False
) -> Plan:
    """The fastest way to decode latents of shape [B, c, t, h, w] within `budget` bytes; exact, if an exact way fits.

    Args:
        budget: bytes in addition to the weights, the latents and the clip; None: as many as the fastest way needs.
        stream: plan for `decode_stream`, which supports no tiles.
        approximate: whether blended tiles are acceptable if nothing exact fits.

    Raises:
        BudgetError: nothing fits the budget.
        ValueError: the shape does not have five sides of at least 1.
    """
    _check_shape(z_shape)
    return _plan(kvae, kvae.decoder, z_shape, 1, budget, stream, approximate)


def plan_encode(
    kvae: KVAE, x_shape: Sequence[int], budget: int | None = None, stream: bool = False, approximate: bool = False
) -> Plan:
    """The fastest way to encode pixels of shape [B, 3, T, H, W] within `budget` bytes; exact, if an exact way fits.

    Args:
        budget: bytes in addition to the weights, the latents and the clip; None: as many as the fastest way needs.
        stream: plan for `encode_stream`, which supports no tiles.
        approximate: whether blended tiles are acceptable if nothing exact fits.

    Raises:
        BudgetError: nothing fits the budget.
        ValueError: the shape does not have five sides of at least 1.
    """
    _check_shape(x_shape)
    side, temporal_factor = kvae.config.spatial_factor, kvae.config.temporal_compress_times
    B, C, T, H, W = x_shape
    shape = B, C, padded_frames(T, temporal_factor), side * -(-H // side), side * -(-W // side)
    return _plan(kvae, kvae.encoder, shape, side, budget, stream, approximate)


def _plan(
    kvae: KVAE, coder: Coder, shape: Sequence[int], side: int, budget: int | None, stream: bool, approximate: bool
) -> Plan:
    """Plan for a source [B, C, T, H, W] with `side` rows and columns per latent."""
    B, C, T, H, W = shape
    weight = coder.conv_in.conv.weight
    decode = coder is kvae.decoder
    h, w = H // side, W // side

    def planned(execution: Execution, tiling: Tiling) -> Plan:
        rows, columns = (n * side for n in tiling.largest)
        length = execution.segment // (kvae.config.temporal_compress_times if decode else 1)
        tiled = len(tiling) > 1
        tile = B, C, T, rows, columns
        first, most = clip_bytes(kvae, coder, execution, tile, _segment_kinds(T, length), tiled)
        if tiled and not decode and not kvae.config.norm_is_per_position:  # two segments of the shrunk clip
            most += 2 * weight.itemsize * B * 3 * (length + 1) * rows * columns
        return Plan(execution, int(MARGIN * most), int(MARGIN * first))

    plans = []
    for overlap in (None, OVERLAP) if approximate and not stream else (None,):
        tilings = _tilings(kvae, h, w, decode, stream, overlap)
        for execution in _executions(kvae, coder, tilings, overlap):
            plans.append(planned(execution, tilings[execution.tiles]))
            if budget is None or plans[-1].peak <= budget:
                return plans[-1]
    raise BudgetError(budget, min(plans, key=lambda plan: plan.peak))  # type: ignore[arg-type]


def _tilings(
    kvae: KVAE, h: int, w: int, decode: bool, stream: bool, overlap: int | None
) -> dict[tuple[int, int], Tiling]:
    """The tilings to choose from, by (rows, columns) of tiles."""
    if overlap is not None:  # nearly square tiles only: others gain nothing
        counts = {(-(-n * h // max(h, w)), -(-n * w // max(h, w))) for n in range(2, MOST_BLENDED + 1)}
        return {count: blended_tiling(h, w, count, overlap) for count in sorted(counts)}
    most = MOST_TILES if kvae.config.norm_is_per_position and not stream else 1
    pairs = product(range(1, most + 1), range(1, most + 1))
    return {count: exact_tiling(kvae.config, h, w, count, decode) for count in pairs}


def _executions(
    kvae: KVAE, coder: Coder, tilings: dict[tuple[int, int], Tiling], overlap: int | None
) -> list[Execution]:
    """All executions with these tilings, the fastest first."""
    config, blocks = kvae.config, len(coder.full_resolution())
    temporal_factor = config.temporal_compress_times
    segments = (
        (SEGMENT_FRAMES, 2 * temporal_factor, temporal_factor) if config.norm_is_per_position else (SEGMENT_FRAMES,)
    )
    choices = product(segments, STRIP_BYTES, Recompute)
    executions = [Execution(*choice, count, overlap) for choice in choices for count in tilings]
    recomputed_frames = frames_to_recompute(len(kvae.decoder.full_resolution()))
    row = 3 * config.decoder_widths[0] * kvae.decoder.conv_out.conv.weight.element_size() * config.spatial_factor

    def time(execution: Execution) -> float:
        tiling = tilings[execution.tiles]
        rows = execution.strip_bytes / (row * tiling.largest[1] * execution.segment)
        full = execution.recompute == Recompute.FULL_RESOLUTION
        halo = 1 + 2 * blocks * full  # rows beyond a strip: those of all blocks, if they are computed at once
        recompute = RECOMPUTE_COST[config.norm, coder is kvae.decoder][execution.recompute]
        short = 1 + 0.05 * segments.index(execution.segment)
        return recompute * (1 + halo / rows) * short * tiling.work

    possible = (
        each for each in executions if each.recompute < Recompute.FULL_RESOLUTION or each.segment >= recomputed_frames
    )
    return sorted(possible, key=time)


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 5 or min(shape) < 1:
        raise ValueError(f"the shape is {list(shape)}; expected five sides of at least 1: batch, channels, T, H, W")


def _segment_kinds(total: int, length: int) -> list[int]:
    """The segments that a clip is cut into: the first, one in the middle, and the last."""
    if total <= length + 1:
        return [total]
    rest = total - length - 1
    return [length + 1, *[length] * (rest > length), rest % length or length]
