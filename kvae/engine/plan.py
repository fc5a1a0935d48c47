"""Choose how to compute a clip within a memory budget, by adding up beforehand the memory that each execution needs.

plan = plan_decode(kvae, z.shape, budget=6_000_000_000)
print(plan)                                # 16-frame segments, 64 MB strips, …; peak 5.80 GB
video = kvae.decode(z, plan.execution)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from ..coders import Coder
from ..config import SEGMENT_FRAMES
from ..errors import KVAEError
from ..frames import padded_frames
from ..model import KVAE
from .count import Conversion, clip_bytes
from .execution import Execution, Recompute, frames_to_recompute
from .layout import is_nvidia
from .tiles import Tiling, blended_tiling, exact_tiling

NO_CONVERSION = Conversion()
STRIP_BYTES = (256 << 20, 64 << 20, 16 << 20)
NVIDIA_STRIP_BYTES = (1 << 30, 256 << 20, 64 << 20)  # smaller ones would take three times as long to save 2 %
# There, strips of n bytes take 1 + STRIP_COST / n times as long as whole maps. On an H200 it was 1.13 times with
# 256 MB and 1.7 times with 64 MB (KVAE-3D-1.0 in bfloat16, mean of 33x480x832 and 33x720x1280)
STRIP_COST = 36 << 20
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
        strips = f", {execution.strip_bytes >> 20} MB strips" if execution.strip_bytes else ""
        return (
            f"{tiles}{execution.segment}-frame segments{strips}"
            f"{RECOMPUTE_WORDS[execution.recompute]}; peak {self.peak / 1e9:.2f} GB"
        )


class BudgetError(KVAEError, ValueError):
    """Nothing fits the budget. `least` is the plan that needs the least memory."""

    def __init__(self, budget: int, least: Plan):
        approximate = "" if least.execution.overlap else ", or turn on approximate tiles if there is such an option"
        super().__init__(
            f"this clip needs at least {least.peak / 1e9:.2f} GB in addition to the weights, but the budget is "
            f"{budget / 1e9:.2f} GB; raise the budget, lower the resolution{approximate}"
        )
        self.least = least


def plan_decode(
    kvae: KVAE,
    z_shape: Sequence[int],
    budget: int | None = None,
    stream: bool = False,
    approximate: bool = False,
    device: torch.device | None = None,
    conversion: Conversion = NO_CONVERSION,
) -> Plan:
    """The fastest way to decode latents of shape [B, c, t, h, w] within `budget` bytes; exact, if an exact way fits.

    Args:
        budget: bytes in addition to the weights, the latents and the clip; None: as many as the fastest way needs.
        stream: plan for `decode_stream`, which supports no tiles.
        approximate: whether blended tiles are acceptable if nothing exact fits.
        device: where it will run. None: where the weights are.
        conversion: what it takes to make the latents, piece by piece, of others. It is part of the plan.

    Raises:
        BudgetError: nothing fits the budget.
        ValueError: the shape does not have five sides of at least 1.
    """
    _check_shape(z_shape)
    search = Search(kvae, kvae.decoder, z_shape, 1, device or weight_of(kvae).device, conversion)
    return search.plan(budget, stream, approximate)


def plan_encode(
    kvae: KVAE,
    x_shape: Sequence[int],
    budget: int | None = None,
    stream: bool = False,
    approximate: bool = False,
    device: torch.device | None = None,
    conversion: Conversion = NO_CONVERSION,
) -> Plan:
    """The fastest way to encode pixels of shape [B, 3, T, H, W] within `budget` bytes; exact, if an exact way fits.

    Args:
        budget: bytes in addition to the weights, the latents and the clip; None: as many as the fastest way needs.
        stream: plan for `encode_stream`, which supports no tiles.
        approximate: whether blended tiles are acceptable if nothing exact fits.
        device: where it will run. None: where the weights are.
        conversion: what it takes to convert the latents, piece by piece, to others. It is part of the plan.

    Raises:
        BudgetError: nothing fits the budget.
        ValueError: the shape does not have five sides of at least 1.
    """
    _check_shape(x_shape)
    side, temporal_factor = kvae.config.spatial_factor, kvae.config.temporal_compress_times
    B, C, T, H, W = x_shape
    shape = B, C, padded_frames(T, temporal_factor), side * -(-H // side), side * -(-W // side)
    search = Search(kvae, kvae.encoder, shape, side, device or weight_of(kvae).device, conversion)
    return search.plan(budget, stream, approximate)


class Search:
    """The search for the plan of one clip.

    Args:
        shape: of the source, [B, C, T, H, W], with `side` rows and columns per latent.
        device: where it will run.
        conversion: of the latents.
    """

    def __init__(
        self,
        kvae: KVAE,
        coder: Coder,
        shape: Sequence[int],
        side: int,
        device: torch.device,
        conversion: Conversion,
    ):
        self.conversion = conversion
        self.kvae, self.coder, self.shape, self.side, self.device = kvae, coder, shape, side, device
        self.decode = coder is kvae.decoder
        self.item_bytes = weight_of(kvae).dtype.itemsize

    def plan(self, budget: int | None, stream: bool, approximate: bool) -> Plan:
        """The fastest plan within the budget."""
        plans = []
        for overlap in (None, OVERLAP) if approximate and not stream else (None,):
            tilings = self._tilings(stream, overlap)
            for execution in self._executions(tilings, overlap):
                plans.append(self._plan(execution, tilings[execution.tiles]))
                if budget is None or plans[-1].peak <= budget:
                    return plans[-1]
        raise BudgetError(budget, min(plans, key=lambda plan: plan.peak))  # type: ignore[arg-type]

    def _plan(self, execution: Execution, tiling: Tiling) -> Plan:
        B, _, T, _, _ = self.shape
        rows, columns = (n * self.side for n in tiling.largest)
        length = execution.segment // (self.kvae.config.temporal_compress_times if self.decode else 1)
        tile, tiled = (B, T, rows, columns), len(tiling) > 1
        segments = _segment_kinds(T, length)
        streamed = self.decode and not tiled  # otherwise the whole latent is converted before, or after
        conversion = self.conversion if streamed else NO_CONVERSION
        first, most = clip_bytes(self.kvae, self.coder, execution, tile, segments, self.device, tiled, conversion)
        if tiled and not self.decode and not self.kvae.config.norm_is_per_position:  # two segments of the shrunk clip
            most += 2 * self.item_bytes * B * 3 * (length + 1) * rows * columns
        if not streamed:
            most = max(most, self.conversion.peak)
        if tiled and self.decode and self.conversion.peak:  # the converted latent itself
            most += self.item_bytes * self.kvae.config.z_channels * B * prod(self.shape[2:])
        return Plan(execution, int(MARGIN * most), int(MARGIN * first))

    def _tilings(self, stream: bool, overlap: int | None) -> dict[tuple[int, int], Tiling]:
        """The tilings to choose from, by (rows, columns) of tiles."""
        h, w = (n // self.side for n in self.shape[3:])
        if overlap is not None:  # nearly square tiles only: others gain nothing
            counts = {(-(-n * h // max(h, w)), -(-n * w // max(h, w))) for n in range(2, MOST_BLENDED + 1)}
            return {count: blended_tiling(h, w, count, overlap) for count in sorted(counts)}
        config = self.kvae.config
        most = MOST_TILES if config.norm_is_per_position and not stream else 1
        pairs = product(range(1, most + 1), range(1, most + 1))
        return {count: exact_tiling(config, h, w, count, self.decode) for count in pairs}

    def _executions(self, tilings: dict[tuple[int, int], Tiling], overlap: int | None) -> list[Execution]:
        """All executions with these tilings, the fastest first."""
        config = self.kvae.config
        rate = config.temporal_compress_times
        segments = (SEGMENT_FRAMES, 2 * rate, rate) if config.norm_is_per_position else (SEGMENT_FRAMES,)
        strips = NVIDIA_STRIP_BYTES if is_nvidia(self.device) else STRIP_BYTES
        needed = frames_to_recompute(len(self.kvae.decoder.full_resolution()))
        possible = [
            Execution(segment, strip_bytes, recompute, count, overlap)
            for segment, strip_bytes, recompute in product(segments, strips, Recompute)
            if recompute < Recompute.FULL_RESOLUTION or segment >= needed
            for count in tilings
        ]
        return sorted(possible, key=lambda execution: self._time(execution, tilings[execution.tiles]))

    def _time(self, execution: Execution, tiling: Tiling) -> float:
        """The time of an execution, relative to that of others."""
        config = self.kvae.config
        strip_bytes = execution.strip_bytes_on(self.device)
        row = 3 * config.decoder_widths[0] * self.item_bytes * config.spatial_factor
        rows = strip_bytes / (row * tiling.largest[1] * execution.segment)
        full = execution.recompute == Recompute.FULL_RESOLUTION
        # rows beyond a strip: those of all blocks, if they are computed at once
        halo = 1 + 2 * len(self.coder.full_resolution()) * full
        strips = 1 + halo / rows
        if is_nvidia(self.device):
            strips += STRIP_COST / strip_bytes
        recompute = RECOMPUTE_COST[config.norm, self.decode][execution.recompute]
        short = 1 + 0.05 * ((SEGMENT_FRAMES // execution.segment).bit_length() - 1)
        return recompute * strips * short * tiling.work


def weight_of(kvae: KVAE) -> Tensor:
    """Any weight: of the model's dtype and device."""
    return kvae.decoder.conv_out.conv.weight


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 5 or min(shape) < 1:
        raise ValueError(f"the shape is {list(shape)}; expected five sides of at least 1: batch, channels, T, H, W")


def _segment_kinds(total: int, length: int) -> list[int]:
    """The segments that a clip is cut into: the first, one in the middle, and the last."""
    if total <= length + 1:
        return [total]
    rest = total - length - 1
    return [length + 1, *[length] * (rest > length), rest % length or length]
