"""The most memory that computing a segment needs, added up beforehand along the functions of `.run_segment`.

It counts the tensors that a segment makes: activations, the padded or converted segment itself, what the stream
keeps, the result of the segment before, and on a CPU the workspace of `.winograd`. It does not count the weights, the
latents, the clip, and what a convolution's kernel allocates for itself.
"""

from __future__ import annotations

from torch import nn

from ..coders import Coder, Decoder
from ..layers import ResnetBlock
from ..model import KVAE
from ..resample import Downsample, Upsample
from .affine import BATCH_NORM_DEVICES, STATISTICS_BYTES
from .execution import PAST_FRAMES, Execution, Recompute, frames_to_recompute
from .map_costs import (
    CostContext,
    FeatureMapCost,
    LazyConvCost,
    LazyResBlockCost,
    LazyUpsampleCost,
    MaterializedCost,
    shortcut_bytes,
    strip_rows,
)
from .strips import largest_strip


class SegmentCost:
    """Adds up the memory in use along the stages of a coder."""

    def __init__(self, kvae: KVAE, coder: Coder, execution: Execution, batch: int):
        self.coder, self.execution = coder, execution
        self.decode = isinstance(coder, Decoder)
        self.temporal_factor, self.side = kvae.config.temporal_compress_times, kvae.config.spatial_factor
        self.group_norm = not kvae.config.norm_is_per_position
        full = execution.recompute >= Recompute.FULL_RESOLUTION
        self.on_demand = coder.full_resolution() if full else ()
        self.copied_frames = frames_to_recompute(len(self.on_demand))
        weight = coder.conv_out.conv.weight
        self.item_bytes = weight.element_size()
        self.statistics_copied = self.item_bytes < 4 and weight.device.type not in BATCH_NORM_DEVICES  # to float32
        self.batch_bytes = batch * self.item_bytes  # bytes of one value for all clips
        self.length = execution.segment // (self.temporal_factor if self.decode else 1)

    def peak_bytes(self, T: int, H: int, W: int, first: bool, last: bool, tiled: bool = False) -> int:
        """The peak of one segment with these sides as it enters the coder; `tiled`: it is of one tile of many."""
        self.first, self.last, self.peak = first, last, 0
        latent = (T, H, W) if self.decode else None
        rms = not self.group_norm
        self.context = CostContext(self.item_bytes, self.batch_bytes, self.execution.strip_bytes, first, rms, latent)
        source = MaterializedCost(self.context, self.coder.conv_in.conv.in_channels, T, H, W)
        self.now = source.bytes
        if tiled or not first:
            self.now += self._previous_result(H, W)
        if not first:
            self.now += self._kept_by_stream(H, W)
        start = LazyConvCost(source, self.coder.conv_in.conv, normed=False)
        self._keep(source.channels, H, W)
        h = self._run_stages(self._materialize(start) if self.decode else start)
        on_demand = isinstance(h, LazyResBlockCost | LazyUpsampleCost)
        out = self._conv(h, self.coder.conv_out.conv, on_demand)
        if not on_demand:
            self._keep(h.channels, h.H, h.W)
        self._materialize(out)
        return self.peak

    def _previous_result(self, H: int, W: int) -> int:
        """The result of the segment before, which the caller may still hold; and its pixels, if those are kept."""
        frames = self.length + 1
        if self.decode:
            pixels = 3 * (self.temporal_factor * frames) * (self.side * H) * (self.side * W)
            return self.batch_bytes * (pixels + self.coder.conv_in.conv.in_channels * frames * H * W)
        moments = self.coder.conv_out.conv.out_channels * -(-frames // self.temporal_factor)
        pixels = 3 * (PAST_FRAMES + self.copied_frames) * H * W if self.on_demand else 0
        return self.batch_bytes * (moments * (H // self.side) * (W // self.side) + pixels)

    def _run_stages(self, h: FeatureMapCost) -> FeatureMapCost:
        stages = list(self.coder.stages())
        for i, stage in enumerate(stages):
            if stage in self.on_demand:
                assert isinstance(stage, ResnetBlock)
                inner = self._conv(h, stage.conv1.conv, recompute_past=True)
                h = LazyResBlockCost(self._conv(inner, stage.conv2.conv, recompute_past=True), stage)
            elif isinstance(stage, ResnetBlock):
                h = self._run_block(h, stage)
            elif isinstance(stage, Downsample):
                h = self._run_downsample(h, stage)
            elif isinstance(stage, Upsample):
                h = self._run_upsample(h, stage, read_on_demand=stages[i + 1] in self.on_demand)
        return h

    def _kept_by_stream(self, H: int, W: int) -> int:
        """All that the stream keeps of a segment of full length."""
        T, shrunk, total = self.length, 1, self._bytes(self.coder.conv_in.conv.in_channels, PAST_FRAMES, H, W)
        for stage in self.coder.stages():
            if stage in self.on_demand:
                continue
            if isinstance(stage, ResnetBlock):
                total += self._bytes(stage.conv1.conv.in_channels, PAST_FRAMES, H, W) // shrunk
                total += self._bytes(stage.conv2.conv.in_channels, PAST_FRAMES, H, W)
                shrunk = 1
            elif isinstance(stage, Downsample):
                H, W = H // 2, W // 2
                if hasattr(stage, "temporal_conv"):
                    T //= 2
                    total += self._bytes(stage.linear.in_channels, 1, H, W)
            elif isinstance(stage, Upsample):
                if hasattr(stage, "temporal_conv"):
                    T *= 2
                    total += self._bytes(stage.linear.in_channels, 1, H, W)
                if self.on_demand and stage is self.coder.up[1].upsample:  # type: ignore[union-attr, index]
                    total += self._bytes(stage.linear.in_channels, self.copied_frames, H, W)
                shrunk = 4 if self.execution.recompute >= Recompute.UPSAMPLED and T >= PAST_FRAMES else 1
                H, W = 2 * H, 2 * W
        recomputed = self.decode and self.on_demand
        return total + (0 if recomputed else self._bytes(self.coder.conv_out.conv.in_channels, PAST_FRAMES, H, W))

    def _bytes(self, channels: int, frames: int, H: int, W: int) -> int:
        return self.batch_bytes * channels * frames * H * W

    def _keep(self, channels: int, H: int, W: int, frames: int = PAST_FRAMES, shrunk: int = 1) -> None:
        """Count what a layer keeps for the next segment; nothing after the last segment."""
        self.now += 0 if self.last else self._bytes(channels, frames, H, W) // shrunk

    def _drop(self, channels: int, H: int, W: int, frames: int = PAST_FRAMES, shrunk: int = 1) -> None:
        """Count off what a layer kept of the segment before."""
        self.now -= 0 if self.first else self._bytes(channels, frames, H, W) // shrunk

    def _touch(self, extra: int) -> None:
        """Note a moment with `extra` bytes in addition to those in use."""
        self.peak = max(self.peak, self.now + extra)

    def _conv(self, source: FeatureMapCost, conv: nn.Conv3d, recompute_past: bool = False) -> LazyConvCost:
        """A convolution of a normalised map, whose statistics are gathered first."""
        if self.group_norm:
            row_values = self.batch_bytes // self.item_bytes * source.channels * source.T * source.W
            row = 4 * row_values if self.statistics_copied else 0
            if isinstance(source, MaterializedCost):
                self._touch(row * largest_strip(source.H, STATISTICS_BYTES // max(1, row)))
            else:
                rows = strip_rows(source)
                self._touch(max(source.peak(rows), source.result(rows) + row * rows))
        return LazyConvCost(source, conv, normed=True, recompute_past=recompute_past)

    def _materialize(
        self, source: LazyConvCost | LazyUpsampleCost, into: bool = False, add: tuple[FeatureMapCost, int] | None = None
    ) -> MaterializedCost:
        """Compute a map: its strips, including the one before, and the map itself unless one strip is all of it.

        Args:
            into: whether the map overwrites another.
            add: the map that is added, and the number of strips that its shortcut makes, 0 or 1.
        """
        rows = strip_rows(source)
        strip, single = source.result(rows), rows == source.H
        made = MaterializedCost(source.context, source.channels, source.T, source.H, source.W)
        peak = source.peak(rows)
        if add:
            added, more = add
            peak = max(peak, strip + added.peak(rows), strip + added.result(rows) + more * strip)
        self._touch(peak + (0 if single else strip) + (0 if single or into else made.bytes))
        self.now += 0 if into else made.bytes
        return made

    def _run_block(self, source: FeatureMapCost, block: ResnetBlock) -> MaterializedCost:
        conv1, conv2 = block.conv1.conv, block.conv2.conv
        sides = source.H, source.W
        recompute_past = isinstance(source, LazyUpsampleCost) and source.T >= PAST_FRAMES
        shrunk = 4 if recompute_past else 1
        inner: FeatureMapCost
        inner = first = self._conv(source, conv1, recompute_past)
        self._keep(conv1.in_channels, *sides, shrunk=shrunk)
        if self.execution.recompute < Recompute.INNER:
            inner = self._materialize(first)
        outer = self._conv(inner, conv2)
        self._keep(conv2.in_channels, *sides)
        same = isinstance(source, MaterializedCost) and source.channels == outer.channels
        into = isinstance(inner, MaterializedCost) or same
        y = self._materialize(outer, into, add=(source, shortcut_bytes(block, 1)))
        if not (into and same and not isinstance(inner, MaterializedCost)):
            self.now -= _bytes_in_memory(source)
        self._drop(conv1.in_channels, *sides, shrunk=shrunk)
        self._drop(conv2.in_channels, *sides)
        return y

    def _run_downsample(self, source: FeatureMapCost, layer: Downsample) -> MaterializedCost:
        cin, cout, T, timed = source.channels, layer.linear.in_channels, source.T, hasattr(layer, "temporal_conv")
        H, W = source.H // 2, source.W // 2
        row = max(source.row_bytes, self.batch_bytes * cin * T * source.W)
        n = largest_strip(H, self.execution.strip_bytes // (2 * row))
        asked = min(source.H, 2 * n + 1)
        strip = self.batch_bytes * n * W  # of one frame and channel
        padded = self.batch_bytes * cin * T * (2 * n + 1) * (source.W + 1)
        peak = max(source.peak(asked), source.result(asked) + padded + cout * T * strip)
        y = MaterializedCost(self.context, cout, (T + 1) // 2 if timed else T, H, W)
        result = cout * y.T * strip
        kept = self._bytes(cout, 1, H, W) if timed else 0  # in the last segment too, before it is dropped
        if timed:
            peak = max(peak, cout * (T + T + 2) * strip + result)  # the strip, alone and with its past
        self._touch(y.bytes + kept + max(peak, result, 0 if self.last else kept))
        if timed:
            self._keep(cout, H, W, frames=1)
            self._drop(cout, H, W, frames=1)
        self.now += y.bytes - _bytes_in_memory(source)
        return y

    def _run_upsample(self, source: FeatureMapCost, layer: Upsample, read_on_demand: bool) -> FeatureMapCost:
        assert isinstance(source, MaterializedCost)
        channels, T = source.channels, source.T
        small = source
        if hasattr(layer, "temporal_conv"):
            kept = self._bytes(channels, 1, source.H, source.W)  # in the last segment too, before it is dropped
            small = MaterializedCost(self.context, channels, 2 * T - self.first, source.H, source.W)
            with_past = source.bytes // T * (T + 1)
            self._touch(kept + with_past + small.bytes + source.bytes)
            self._keep(channels, source.H, source.W, frames=1)
            self._drop(channels, source.H, source.W, frames=1)
            self.now += small.bytes - source.bytes
        if read_on_demand:
            # what is kept of the segment before stays counted to the end
            self._keep(channels, small.H, small.W, frames=min(self.copied_frames, small.T))
        if self.execution.recompute >= Recompute.UPSAMPLED:
            return LazyUpsampleCost(small)
        y = self._materialize(LazyUpsampleCost(small))
        self.now -= small.bytes
        return y


def _bytes_in_memory(source: FeatureMapCost) -> int:
    """Bytes of a map that are in memory as long as it is read."""
    if isinstance(source, LazyUpsampleCost):
        return source.small.bytes
    return source.bytes if isinstance(source, MaterializedCost) else 0
