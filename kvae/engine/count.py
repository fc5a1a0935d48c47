"""What computing a segment holds at one time, added up beforehand: each function is the cost of its twin in `strips`.

Counted are the tensors that a segment makes: activations, the segment itself as it is made ready, what the stream
remembers, what the segment before gave, and on a CPU the working memory of `kvae.engine.winograd`; not the weights, the
latents, the clip, or what a convolution's kernel takes for itself.
"""

from __future__ import annotations

from torch import nn

from ..coders import Coder, Decoder
from ..layers import ResnetBlock
from ..model import KVAE
from ..resample import Downsample, Upsample
from .affine import BATCH_NORM_DEVICES, STATISTICS_BYTES
from .costs import ConvolvedMap, HeldMap, Map, Scene, SummedMap, UpsampledMap, shortcut, strip_of
from .rows import largest_strip
from .strips import PAST, Execution, tail_frames


class Count:
    """Adds up, along the stages of a coder, what is in use."""

    def __init__(self, kvae: KVAE, coder: Coder, execution: Execution, batch: int):
        self.coder, self.execution = coder, execution
        self.decode = isinstance(coder, Decoder)
        self.cadence, self.side = kvae.config.temporal_compress_times, kvae.config.spatial_factor
        self.group = not kvae.config.per_position
        self.lazy = coder.full_resolution() if execution.recompute > 2 else ()
        self.reach = tail_frames(len(self.lazy))
        weight = coder.conv_out.conv.weight
        self.item = weight.element_size()
        self.copied = self.item < 4 and weight.device.type not in BATCH_NORM_DEVICES  # in float32, for statistics
        self.unit = batch * self.item  # bytes of one value for all clips
        self.length = execution.segment // (self.cadence if self.decode else 1)

    def segment(self, T: int, H: int, W: int, first: bool, last: bool, tiled: bool = False) -> int:
        """The peak of one segment that enters the coder with these sides; `tiled`: of one tile of many."""
        self.first, self.last, self.peak = first, last, 0
        latent = (T, H, W) if self.decode else None
        rms = not self.group
        self.scene = Scene(self.item, self.unit, self.execution.strip_bytes, first, rms, latent)
        source = HeldMap(self.scene, self.coder.conv_in.conv.in_channels, T, H, W)
        self.now = source.bytes
        if tiled or not first:
            self.now += self._given(H, W)
        if not first:
            self.now += self._remembered(H, W)
        start = ConvolvedMap(source, self.coder.conv_in.conv, normed=False)
        self._keep(source.channels, H, W)
        h = self._run(self._hold(start) if self.decode else start)
        again = isinstance(h, SummedMap | UpsampledMap)
        out = self._convolved(h, self.coder.conv_out.conv, again)
        if not again:
            self._keep(h.channels, h.H, h.W)
        self._hold(out)
        return self.peak

    def _given(self, H: int, W: int) -> int:
        """What the segment before gave, which whoever took it may still hold; and its pixels, where those are kept."""
        frames = self.length + 1
        if self.decode:
            pixels = 3 * (self.cadence * frames) * (self.side * H) * (self.side * W)
            return self.unit * (pixels + self.coder.conv_in.conv.in_channels * frames * H * W)
        moments = self.coder.conv_out.conv.out_channels * -(-frames // self.cadence)
        pixels = 3 * (PAST + self.reach) * H * W if self.lazy else 0
        return self.unit * (moments * (H // self.side) * (W // self.side) + pixels)

    def _run(self, h: Map) -> Map:
        """All stages."""
        stages = list(self.coder.stages())
        for i, stage in enumerate(stages):
            if stage in self.lazy:
                assert isinstance(stage, ResnetBlock)
                inner = self._convolved(h, stage.conv1.conv, again=True)
                h = SummedMap(self._convolved(inner, stage.conv2.conv, again=True), stage)
            elif isinstance(stage, ResnetBlock):
                h = self._resnet(h, stage)
            elif isinstance(stage, Downsample):
                h = self._halve(h, stage)
            elif isinstance(stage, Upsample):
                h = self._upsample(h, stage, to_lazy=stages[i + 1] in self.lazy)
        return h

    def _remembered(self, H: int, W: int) -> int:
        """All that the stream remembers of a segment of full length."""
        T, small, total = self.length, 1, self._memory(self.coder.conv_in.conv.in_channels, PAST, H, W)
        for stage in self.coder.stages():
            if stage in self.lazy:
                continue
            if isinstance(stage, ResnetBlock):
                total += self._memory(stage.conv1.conv.in_channels, PAST, H, W) // small
                total += self._memory(stage.conv2.conv.in_channels, PAST, H, W)
                small = 1
            elif isinstance(stage, Downsample):
                H, W = H // 2, W // 2
                if hasattr(stage, "temporal_conv"):
                    T //= 2
                    total += self._memory(stage.linear.in_channels, 1, H, W)
            elif isinstance(stage, Upsample):
                if hasattr(stage, "temporal_conv"):
                    T *= 2
                    total += self._memory(stage.linear.in_channels, 1, H, W)
                if self.lazy and stage is self.coder.up[1].upsample:  # type: ignore[union-attr, index]
                    total += self._memory(stage.linear.in_channels, self.reach, H, W)
                small = 4 if self.execution.recompute and T >= PAST else 1
                H, W = 2 * H, 2 * W
        again = self.decode and self.lazy
        return total + (0 if again else self._memory(self.coder.conv_out.conv.in_channels, PAST, H, W))

    def _memory(self, channels: int, frames: int, H: int, W: int) -> int:
        return self.unit * channels * frames * H * W

    def _keep(self, channels: int, H: int, W: int, frames: int = PAST, shrunk: int = 1) -> int:
        """What a layer will remember; nothing after the last segment."""
        kept = 0 if self.last else self._memory(channels, frames, H, W) // shrunk
        self.now += kept
        return kept

    def _forget(self, channels: int, H: int, W: int, frames: int = PAST, shrunk: int = 1) -> None:
        if not self.first:
            self.now -= self._memory(channels, frames, H, W) // shrunk

    def _touch(self, extra: int) -> None:
        self.peak = max(self.peak, self.now + extra)

    def _convolved(self, source: Map, conv: nn.Conv3d, again: bool = False) -> ConvolvedMap:
        """A convolution of a normalised map, whose statistics are gathered first."""
        if self.group:
            row = self.unit // self.item * source.channels * source.T * source.W * 4 if self.copied else 0
            if isinstance(source, HeldMap):
                self._touch(row * largest_strip(source.H, STATISTICS_BYTES // max(1, row)))
            else:
                rows = strip_of(source)
                self._touch(max(source.peak(rows), source.result(rows) + row * rows))
        return ConvolvedMap(source, conv, normed=True, again=again)

    def _hold(
        self, rows: ConvolvedMap | UpsampledMap, into: bool = False, add: tuple[Map, int] | None = None
    ) -> HeldMap:
        """A held map in the making: its strips, the one before included, and the map itself unless one strip is all.

        Args:
            into: whether it takes the place of another.
            add: what is added, and how many more of its size that makes.
        """
        most = strip_of(rows)
        part, whole = rows.result(most), most == rows.H
        held = HeldMap(rows.scene, rows.channels, rows.T, rows.H, rows.W)
        peak = rows.peak(most)
        if add:
            source, more = add
            peak = max(peak, part + source.peak(most), part + source.result(most) + more * part)
        self._touch(peak + (0 if whole else part) + (0 if whole or into else held.bytes))
        self.now += 0 if into else held.bytes
        return held

    def _resnet(self, source: Map, block: ResnetBlock) -> HeldMap:
        conv1, conv2 = block.conv1.conv, block.conv2.conv
        sides = source.H, source.W
        again = isinstance(source, UpsampledMap) and source.T >= PAST
        shrunk = 4 if again else 1
        inner: Map
        inner = first = self._convolved(source, conv1, again)
        self._keep(conv1.in_channels, *sides, shrunk=shrunk)
        if self.execution.recompute < 2:
            inner = self._hold(first)
        outer = self._convolved(inner, conv2)
        self._keep(conv2.in_channels, *sides)
        same = isinstance(source, HeldMap) and source.channels == outer.channels
        into = isinstance(inner, HeldMap) or same
        y = self._hold(outer, into, add=(source, shortcut(block, 1)))
        if not (into and same and not isinstance(inner, HeldMap)):
            self.now -= _bytes(source)
        self._forget(conv1.in_channels, *sides, shrunk=shrunk)
        self._forget(conv2.in_channels, *sides)
        return y

    def _halve(self, source: Map, layer: Downsample) -> HeldMap:
        cin, cout, T, timed = source.channels, layer.linear.in_channels, source.T, hasattr(layer, "temporal_conv")
        H, W = source.H // 2, source.W // 2
        row = max(source.row_bytes, self.unit * cin * T * source.W)
        n = largest_strip(H, self.execution.strip_bytes // (2 * row))
        asked = min(source.H, 2 * n + 1)
        strip = self.unit * n * W  # of one frame and channel
        framed = self.unit * cin * T * (2 * n + 1) * (source.W + 1)
        peak = max(source.peak(asked), source.result(asked) + framed + cout * T * strip)
        y = HeldMap(self.scene, cout, (T + 1) // 2 if timed else T, H, W)
        given = cout * y.T * strip
        kept = self._memory(cout, 1, H, W) if timed else 0  # in the last segment too, before it is dropped
        if timed:
            peak = max(peak, cout * (T + T + 2) * strip + given)  # itself, and behind its past
        self._touch(y.bytes + kept + max(peak, given, 0 if self.last else kept))
        if timed:
            self._keep(cout, H, W, frames=1)
            self._forget(cout, H, W, frames=1)
        self.now += y.bytes - _bytes(source)
        return y

    def _upsample(self, source: Map, layer: Upsample, to_lazy: bool) -> Map:
        assert isinstance(source, HeldMap)
        channels, T = source.channels, source.T
        small = source
        if hasattr(layer, "temporal_conv"):
            kept = self._memory(channels, 1, source.H, source.W)  # in the last segment too, before it is dropped
            small = HeldMap(self.scene, channels, 2 * T - self.first, source.H, source.W)
            behind = source.bytes // T * (T + 1)
            self._touch(kept + behind + small.bytes + source.bytes)
            self._keep(channels, source.H, source.W, frames=1)
            self._forget(channels, source.H, source.W, frames=1)
            self.now += small.bytes - source.bytes
        if to_lazy:
            self._keep(channels, small.H, small.W, frames=min(self.reach, small.T))
            # what is remembered of the segment before is counted to the end
        if self.execution.recompute:
            return UpsampledMap(small)
        y = self._hold(UpsampledMap(small))
        self.now -= small.bytes
        return y


def _bytes(source: Map) -> int:
    """Of what is in memory once for all rows of it."""
    if isinstance(source, UpsampledMap):
        return source.small.bytes
    return source.bytes if isinstance(source, HeldMap) else 0
