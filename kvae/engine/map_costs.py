"""Memory that feature maps need while they are computed on demand: one class for each feature map of `.lazy_maps`.

Each class counts the bytes of the tensors that the map makes, at the moment when they are largest in sum.

    # B batch, C channels, T frames, H/W rows and columns, t/h/w of the latent
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..layers import ResnetBlock
from . import winograd
from .execution import PAST_FRAMES
from .strips import largest_strip


@dataclass(frozen=True)
class CostContext:
    """What the costs of all maps of a segment depend on.

    Attributes:
        item_bytes: bytes of one value.
        batch_bytes: bytes of one value for all clips of the batch.
        strip_bytes: see `Execution`.
        first: whether the segment starts the stream, so that there are no past frames.
        rms: whether the norms are RMS norms.
        latent: frames, rows and columns of the latent that conditions the norms, in the decoder.
    """

    item_bytes: int
    batch_bytes: int
    strip_bytes: int
    first: bool
    rms: bool
    latent: tuple[int, int, int] | None

    def norm(self, channels: int, T: int, rows: int, H: int, W: int, last_frames: bool = False) -> int:
        """Bytes that normalising `rows` of H rows needs in addition to input and output."""
        rms_norms = self.batch_bytes * T * rows * W if self.rms else 0
        if not self.latent:
            return rms_norms
        t, h, w = self.latent
        covered = min(h, -(-rows * h // H) + 1)  # rows of the latent
        scales = t * ((3 * self.item_bytes + 8) * covered + 2 * self.item_bytes * rows)  # and repeated for each row
        scales += 2 * self.item_bytes * rows * (T + t) if last_frames else 0  # and for each frame
        return max(rms_norms, self.batch_bytes // self.item_bytes * channels * w * scales)


class FeatureMapCost(Protocol):
    """The cost of a feature map that is read by rows."""

    context: CostContext
    channels: int
    T: int
    H: int
    W: int
    row_bytes: int  # the same as the map's own, which determines the height of strips

    def peak(self, rows: int) -> int:
        """The most bytes in use while `rows` rows are computed, including these rows."""

    def result(self, rows: int) -> int:
        """Bytes of `rows` computed rows."""

    def last_frames(self, frames: int) -> FeatureMapCost:
        """The cost of the last frames alone."""


class MaterializedCost:
    """A map in memory. Reading it costs nothing; `bytes` are counted where it is made."""

    row_bytes = 0

    def __init__(self, context: CostContext, channels: int, T: int, H: int, W: int):
        self.context, self.channels, self.T, self.H, self.W = context, channels, T, H, W
        self.bytes = context.batch_bytes * channels * T * H * W

    def peak(self, rows: int) -> int:
        return 0

    def result(self, rows: int) -> int:
        return 0

    def last_frames(self, frames: int) -> MaterializedCost:
        return MaterializedCost(self.context, self.channels, frames, self.H, self.W)


class LazyUpsampleCost:
    """Rows and columns of a smaller map in memory, doubled."""

    def __init__(self, small: MaterializedCost):
        self.small, self.context = small, small.context
        self.channels, self.T, self.H, self.W = small.channels, small.T, 2 * small.H, 2 * small.W
        self.row_bytes = 3 * self.context.batch_bytes * self.channels * self.T * small.W

    def _small_rows(self, rows: int) -> int:
        return min(self.small.H, rows // 2 + 1)

    def peak(self, rows: int) -> int:
        small, W = self._small_rows(rows), self.small.W
        quarter, padded = small * W, (small + 2) * (W + 2)
        return self.result(rows) + self.context.batch_bytes * self.channels * self.T * (quarter + padded)

    def result(self, rows: int) -> int:
        return self.context.batch_bytes * self.channels * self.T * 2 * self._small_rows(rows) * self.W

    def last_frames(self, frames: int) -> LazyUpsampleCost:
        return LazyUpsampleCost(self.small.last_frames(frames))


class LazyConvCost:
    """A convolution of another map, which is normalised first if `normed`.

    Args:
        recompute_past: whether its past frames are recomputed, from the last frames of the same map.
        last: number of frames, if this is the cost of the last frames of a map, which start two frames into its source.
    """

    def __init__(
        self,
        source: FeatureMapCost,
        conv: nn.Conv3d,
        normed: bool,
        recompute_past: bool = False,
        last: int | None = None,
    ):
        self.source, self.conv, self.normed, self.context = source, conv, normed, source.context
        self.channels, self.T, self.H, self.W = conv.out_channels, last or source.T, source.H, source.W
        past = recompute_past and not self.context.first and last is None
        self.past = source.last_frames(PAST_FRAMES) if past else None
        self.is_last_frames = last is not None
        both = source.channels + self.channels
        self.row_bytes = source.row_bytes + self.context.batch_bytes * both * (self.T + 2) * (self.W + 2)

    def peak(self, rows: int) -> int:
        asked = min(self.H, rows + 2)
        return self.peak_after(rows, self.source.peak(asked), self.source.result(asked))

    def peak_after(self, rows: int, source_peak: int, source_bytes: int) -> int:
        """The peak, if computing the rows of the source has a peak of `source_peak` and leaves `source_bytes`."""
        context, W, C = self.context, self.W, self.source.channels
        rows, asked = min(self.H, rows), min(self.H, rows + 2)
        padded = context.batch_bytes * C * (self.T + 2) * (rows + 2) * (W + 2)
        read = self.T + 2 if self.is_last_frames else self.T
        norm = context.norm(C, read, asked, self.H, W, self.is_last_frames) if self.normed else 0
        work = self.result(rows) + winograd.workspace_bytes(self.conv.weight, self.T, rows, W)
        return max(source_peak, source_bytes + padded + max(norm, work, self._past_peak(asked)))

    def _past_peak(self, rows: int) -> int:
        """The peak while the past frames are recomputed."""
        if self.past is None:
            return 0
        y = self.context.batch_bytes * self.past.channels * PAST_FRAMES * rows * self.W
        norm = self.context.norm(self.past.channels, PAST_FRAMES, rows, self.H, self.W, last_frames=True)
        return max(self.past.peak(rows), self.past.result(rows) + y + norm)

    def result(self, rows: int) -> int:
        return self.context.batch_bytes * self.channels * self.T * min(self.H, rows) * self.W

    def last_frames(self, frames: int) -> LazyConvCost:
        return LazyConvCost(self.source.last_frames(frames + PAST_FRAMES), self.conv, self.normed, last=frames)


class LazyResBlockCost:
    """A block's output, from its second convolution. Both branches share the rows that they read."""

    def __init__(self, outer: LazyConvCost, block: ResnetBlock):
        assert isinstance(outer.source, LazyConvCost)
        self.outer, self.inner, self.block = outer, outer.source, block
        self.source, self.context = self.inner.source, outer.context
        self.channels, self.T, self.H, self.W = outer.channels, outer.T, outer.H, outer.W
        self.row_bytes = self.context.batch_bytes * self.channels * self.T * self.W

    def peak(self, rows: int) -> int:
        inner_rows, asked = min(self.H, rows + 2), min(self.H, rows + 4)
        x, y = self.source.result(asked), self.result(rows)
        inner = self.inner.peak_after(inner_rows, 0, 0)
        outer = self.outer.peak_after(rows, inner, self.inner.result(inner_rows))
        return max(self.source.peak(asked), x + max(outer, y + shortcut_bytes(self.block, y)))

    def result(self, rows: int) -> int:
        return self.outer.result(rows)

    def last_frames(self, frames: int) -> LazyResBlockCost:
        return LazyResBlockCost(self.outer.last_frames(frames), self.block)


def shortcut_bytes(block: ResnetBlock, y: int) -> int:
    """Bytes that a block's shortcut makes for a result of y bytes: 0 if the shortcut is the input itself."""
    return y if hasattr(block, "nin_shortcut") else 0


def strip_rows(source: FeatureMapCost) -> int:
    """Rows of the tallest strip that `SegmentRun.strips` makes of the map."""
    return largest_strip(source.H, source.context.strip_bytes // max(1, source.row_bytes))
