"""Add up beforehand the memory that a run takes: the run itself, on tensors that hold nothing but their size.

The functions of `.run_segment` make all that lives for a while in `SegmentRun.empty` and its like. Here it is counted
from then on until nothing refers to it any more. What a map needs while a strip of it is computed, the map itself says.

Not counted are the weights, the latents, the clip, and what a convolution's kernel allocates for itself, except the
workspace of `.winograd`; and, on a GPU, PyTorch's copies of windows that are slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..coders import Coder
from ..model import KVAE
from ..resample import Downsample, Upsample
from . import by_frames, downsample
from .affine import ScaleShift
from .execution import Execution
from .feature_map import FeatureMap, Materialized, Rows
from .layout import fastest_format
from .run_segment import run_stages
from .segment import SegmentRun
from .statistics import statistics_bytes
from .stream_state import StreamState
from .strips import largest_strip

NO_VALUES = cast(ScaleShift, (None, None))


class Ledger:
    """The bytes in use now, and the most that were ever in use."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def touch(self, extra: int) -> None:
        """Note a moment with `extra` bytes in addition to those in use."""
        self.peak = max(self.peak, self.now + extra)


class Memory:
    """Bytes that are in use as long as this object lives."""

    def __init__(self, ledger: Ledger, size: int):
        self.ledger, self.size = ledger, size
        ledger.now += size
        ledger.touch(0)

    def __del__(self) -> None:
        self.ledger.now -= self.size


class SizeOnly:
    """A tensor that holds nothing. Slices of it share its memory; a clone has its own."""

    def __init__(self, shape: Sequence[int], item_bytes: int, memory: Memory):
        self.shape, self.item_bytes, self.memory = torch.Size(shape), item_bytes, memory

    @classmethod
    def made(cls, shape: Sequence[int], item_bytes: int, ledger: Ledger) -> Tensor:
        """One with memory of its own, to be used as a tensor."""
        return cast(Tensor, cls(shape, item_bytes, Memory(ledger, item_bytes * prod(shape))))

    def __getitem__(self, index: tuple[slice, ...]) -> SizeOnly:
        sliced = (len(range(n)[part]) for n, part in zip(self.shape, index, strict=False))
        return SizeOnly((*sliced, *self.shape[len(index) :]), self.item_bytes, self.memory)

    def clone(self) -> Tensor:
        return SizeOnly.made(self.shape, self.item_bytes, self.memory.ledger)


class CountedRun(SegmentRun):
    """A segment's run of which only the memory is counted. Each method is the twin of that of `SegmentRun`."""

    def __init__(self, ledger: Ledger, *args: Any):
        super().__init__(*args)
        self.ledger = ledger

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return SizeOnly.made(shape, self.dtype.itemsize, self.ledger)

    def rms(self, norm: nn.Module) -> ScaleShift:
        return NO_VALUES

    def statistics(self, norm: nn.GroupNorm, source: FeatureMap) -> ScaleShift:
        self.ledger.touch(statistics_bytes(source, self._tallest_strip(source), self.dtype, self.device))
        return NO_VALUES

    def materialize(
        self, source: FeatureMap, into: Materialized | None = None, add: Rows | None = None
    ) -> Materialized:
        rows = self._tallest_strip(source)
        strip, single = source.result_bytes(rows), rows == source.shape[3]
        peak = source.peak_bytes(rows)
        if add:
            peak = max(peak, strip + add.peak_bytes(rows))
        if single:
            self.ledger.touch(peak)
            return Materialized(self.empty(source.shape))
        made = into or Materialized(self.empty(source.shape))
        self.ledger.touch(peak + strip)  # the strip before is written after this one has been computed
        return made

    def double_time(self, x_BCTHW: Tensor, upsample: Upsample) -> Tensor:
        B, C, T, H, W = x_BCTHW.shape
        past = self.empty((B, C, 1, H, W))  # in the last segment too, and that of the segment before is dropped
        self.state.cache.pop(upsample.name, None)
        if not self.last:
            self.state.cache[upsample.name] = past
        y = self.empty((B, C, 2 * T - self.first, H, W))
        with_past, every_other_frame = self.bytes_of(B, C, T + 1, H, W), self.bytes_of(B, C, T, H, W)
        self.ledger.touch(with_past + every_other_frame)
        return y

    def downsample(self, source: FeatureMap, layer: Downsample) -> Materialized:
        return downsample.count(self, source, layer)

    def _tallest_strip(self, source: FeatureMap) -> int:
        """Rows of the tallest strip that `SegmentRun.strips` makes of the map."""
        return largest_strip(source.shape[3], self.rows_in_a_strip(source.row_bytes))


@dataclass(frozen=True)
class Conversion:
    """Memory in which someone else makes the latents that are decoded, or reads those that were encoded, by pieces.

    Attributes:
        peak: the most bytes in use while a piece is converted, including those in `kept`.
        kept: bytes that stay in use until the next piece is made.
    """

    peak: int = 0
    kept: int = 0


def clip_bytes(
    kvae: KVAE,
    coder: Coder,
    execution: Execution,
    shape: Sequence[int],
    segments: Sequence[int],
    device: torch.device,
    tiled: bool,
    conversion: Conversion,
) -> tuple[int, int]:
    """The most bytes that the first segment needs, and that any segment needs.

    Args:
        shape: [B, T, H, W] of the clip or the latents.
        segments: frames or latents of each segment that may need most: of the first, of one in the middle, of the last.
        device: where it will run, which need not be where the weights are.
        tiled: whether the clip is one of many tiles, so that the result of another may still be in memory.
        conversion: makes the latents of each segment before it runs.
    """
    dtype = coder.conv_in.conv.weight.dtype
    ledger, state = Ledger(), StreamState()
    B, _, H, W = shape
    C = coder.conv_in.conv.in_channels

    def run(T: int, first: bool, last: bool) -> Tensor:
        segment = CountedRun(ledger, execution, state, first, last, dtype, device, fastest_format(device))
        return run_stages(segment, segment.empty((B, C, T, H, W)), coder)

    kept = Memory(ledger, conversion.kept)
    # whoever is given a result may hold it until there is the next one
    result: Tensor | None = None
    if tiled:
        of_another_tile = _result_shape(kvae, coder, (B, C, max(segments), H, W))
        result = SizeOnly.made(of_another_tile, dtype.itemsize, ledger)
    most_of_first = 0
    for i, T in enumerate(segments):
        ledger.touch(conversion.peak - conversion.kept)
        result = run(T, first=i == 0, last=i == len(segments) - 1)
        most_of_first = most_of_first or ledger.peak
    del result, kept
    workspace = by_frames.workspace_bytes(coder.parameters())
    return most_of_first + workspace, ledger.peak + workspace


def _result_shape(kvae: KVAE, coder: Coder, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what a segment of this shape results in, or of a frame or two more."""
    B, _, T, H, W = shape
    rate, side = kvae.config.temporal_compress_times, kvae.config.spatial_factor
    if coder is kvae.decoder:
        return B, 3, rate * T, side * H, side * W
    return B, coder.conv_out.conv.out_channels, -(-T // rate), H // side, W // side
