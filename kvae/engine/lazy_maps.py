"""Feature maps that are computed on demand, by rows, from other feature maps.

A 3x3 window needs one row beyond its strip. What a convolution reads is normalised straight into its padded input.

    # B batch, C channels, T frames, H/W rows and columns, lo:hi rows
    # x_BCTHW
"""

from __future__ import annotations

from copy import copy
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..layers import CausalConv3d, ResnetBlock, fill_border
from ..resample import Upsample
from . import winograd
from .affine import NormAffine
from .convolution import conv3d
from .execution import PAST_FRAMES
from .feature_map import FeatureMap, Materialized, ReadRows, Rows
from .layout import empty_in_layout_of
from .segment import SegmentRun


class LazyConv:
    """A causal convolution of another feature map, on demand; if a norm is given, norm and SiLU come first.

    Args:
        recompute_past: whether the next segment recomputes its past, the last two frames of this convolution's input.
            Otherwise they are stored, strip by strip. They are stored too if the source has fewer than two frames,
            since half of the past then belongs to the segment before.
    """

    def __init__(
        self,
        segment: SegmentRun,
        source: FeatureMap,
        conv: CausalConv3d,
        norm: nn.Module | None,
        recompute_past: bool = False,
    ):
        B, C, T, H, W = source.shape
        self.shape = torch.Size((B, conv.conv.out_channels, T, H, W))
        self.segment, self.source, self.conv = segment, source, conv
        self.affine = segment.affine(norm, source, conv.name) if norm else None
        channels = C + conv.conv.out_channels
        self.row_bytes = source.row_bytes + segment.bytes_of(B, channels, T + 2, 1, W + 2)
        self.lead_frames = 0  # frames of the source before those of the output
        self.past: Rows | None = segment.state.past_frames.pop(conv.name, None)
        self.next_past: Materialized | None = None
        if segment.last:
            return
        if not recompute_past or T < PAST_FRAMES:
            self.next_past = Materialized(segment.empty((B, C, PAST_FRAMES, H, W)))
        elif self.affine:
            past = LazyPast(segment, source.last_frames(PAST_FRAMES), self.affine.last_frames(PAST_FRAMES, T))
            segment.state.past_frames[conv.name] = past

    def last_frames(self, frames: int) -> LazyConv:
        """The last frames alone. The source has the two frames before them, so no past is needed."""
        part = copy(self)
        part.source = self.source.last_frames(frames + PAST_FRAMES)
        part.affine = self.affine and self.affine.last_frames(frames + PAST_FRAMES, self.shape[2])
        part.lead_frames, part.past, part.next_past = PAST_FRAMES, None, None
        part.shape = torch.Size((*self.shape[:2], frames, *self.shape[3:]))
        return part

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.compute(self.source, lo, hi)

    def compute(self, source: ReadRows, lo: int, hi: int) -> Tensor:
        """The rows, read from `source`, which has the same values as the map's own source."""
        B, C, _, H, W = self.source.shape
        T = self.shape[2]
        above, below = min(lo, 1), min(H - hi, 1)  # source rows beyond the strip; at the picture's edge, a border
        x = source(lo - above, hi + below)
        padded = empty_in_layout_of(x, (B, C, T + 2, hi - lo + 2, W + 2))
        inner = padded[:, :, :, 1 - above : padded.shape[3] - 1 + below, 1:-1]
        now = inner[:, :, 2 - self.lead_frames :]
        unfilled = padded  # frames that have no border yet
        if self.affine and self.affine.write_fused(
            x, lo - above, hi + below, padded[:, :, 2 - self.lead_frames :], (1 - above, 1), self.conv.padding
        ):
            unfilled = padded[:, :, : 2 - self.lead_frames]
        elif self.affine:
            self.affine.write(x, lo - above, hi + below, out=now)
        else:
            now.copy_(x)
        if not self.lead_frames:
            inner[:, :, :2] = now[:, :, :1] if self.past is None else self.past(lo - above, hi + below)
        if self.next_past:
            self.next_past.x[:, :, :, lo:hi] = padded[:, :, T:, 1:-1, 1:-1]
        fill_border(unfilled, self.conv.padding, (True, True, not above, not below))
        return conv3d(padded, self.conv.conv.weight, self.conv.conv.bias)

    def peak_bytes(self, rows: int) -> int:
        asked = min(self.shape[3], rows + 2)
        return self.peak_bytes_after(rows, self.source.peak_bytes(asked), self.source.result_bytes(asked))

    def peak_bytes_after(self, rows: int, source_peak: int, source_bytes: int) -> int:
        """The peak of `compute`, if reading its source has a peak of `source_peak` and leaves `source_bytes`."""
        B, C, _, H, W = self.source.shape
        T, rows, asked = self.shape[2], min(H, rows), min(H, rows + 2)
        padded = self.segment.bytes_of(B, C, T + 2, rows + 2, W + 2)
        norm = 0
        if self.affine:
            shape = B, C, T + self.lead_frames, asked, W
            norm = self.affine.workspace_bytes(shape, self.segment.dtype.itemsize, self.segment.device)
        work = self.result_bytes(rows)
        if self.segment.device.type == "cpu":
            work += winograd.workspace_bytes(self.conv.conv.weight, T, rows, W)
        past = self.past.peak_bytes(asked) if self.past else 0
        return max(source_peak, source_bytes + padded + max(norm, work, past))

    def result_bytes(self, rows: int) -> int:
        B, C, T, H, W = self.shape
        return self.segment.bytes_of(B, C, T, min(H, rows), W)

    def store_past(self) -> None:
        """Hand the collected frames to the stream's state; to be called once all rows have been computed."""
        if self.next_past:
            self.segment.state.past_frames[self.conv.name] = self.next_past


class LazyResBlock:
    """A residual block's output, on demand, from its second convolution. Both branches share the rows that they read.

    Args:
        outer: the block's second convolution, whose source is the first.
    """

    def __init__(self, outer: LazyConv, block: ResnetBlock):
        assert isinstance(outer.source, LazyConv)
        self.outer, self.inner, self.source = outer, outer.source, outer.source.source
        self.block, self.shape = block, outer.shape
        self.row_bytes = outer.result_bytes(1)

    def last_frames(self, frames: int) -> LazyResBlock:
        """The last frames alone."""
        return LazyResBlock(self.outer.last_frames(frames), self.block)

    def __call__(self, lo: int, hi: int) -> Tensor:
        top, bottom = max(lo - 2, 0), min(hi + 2, self.shape[3])
        x = self.source(top, bottom)

        def source(lo: int, hi: int) -> Tensor:
            return x[:, :, :, lo - top : hi - top]

        y = self.outer.compute(partial(self.inner.compute, source), lo, hi)
        y += self.block.shortcut(source(lo, hi)[:, :, -y.shape[2] :])
        return y

    def peak_bytes(self, rows: int) -> int:
        H = self.shape[3]
        inner_rows, asked = min(H, rows + 2), min(H, rows + 4)
        x, y = self.source.result_bytes(asked), self.result_bytes(rows)
        inner = self.inner.peak_bytes_after(inner_rows, 0, 0)
        outer = self.outer.peak_bytes_after(rows, inner, self.inner.result_bytes(inner_rows))
        shortcut = y if self.block.shortcut_is_a_convolution else 0
        return max(self.source.peak_bytes(asked), x + max(outer, y + shortcut))

    def result_bytes(self, rows: int) -> int:
        return self.outer.result_bytes(rows)


class Shortcut:
    """What a residual block adds to its second convolution: rows of its input, with as many channels as the output."""

    def __init__(self, source: FeatureMap, block: ResnetBlock, outer: LazyConv):
        self.source, self.block, self.outer = source, block, outer

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.block.shortcut(self.source(lo, hi))

    def peak_bytes(self, rows: int) -> int:
        made = self.outer.result_bytes(rows) if self.block.shortcut_is_a_convolution else 0
        return max(self.source.peak_bytes(rows), self.source.result_bytes(rows) + made)


class LazyPast:
    """The last frames of an earlier segment after norm and SiLU, on demand, with the statistics of that segment."""

    def __init__(self, segment: SegmentRun, source: FeatureMap, affine: NormAffine):
        self.segment, self.source, self.affine = segment, source, affine

    def __call__(self, lo: int, hi: int) -> Tensor:
        x = self.source(lo, hi)
        y = torch.empty_like(x)
        if not self.affine.write_fused(x, lo, hi, out=y):
            self.affine.write(x, lo, hi, out=y)
        return y

    def peak_bytes(self, rows: int) -> int:
        B, C, T, _, W = self.source.shape
        shape = B, C, T, rows, W
        norm = self.affine.workspace_bytes(shape, self.segment.dtype.itemsize, self.segment.device)
        made = self.segment.bytes_of(*shape) + norm
        return max(self.source.peak_bytes(rows), self.source.result_bytes(rows) + made)


class LazyUpsample:
    """An upsampler's output: rows and columns on demand. Frames are doubled beforehand, while pictures are still small.

    Args:
        copied_frames: the most frames that `last_frames` is asked for.
    """

    def __init__(self, segment: SegmentRun, source: Materialized, upsample: Upsample, copied_frames: int):
        self.segment, self.upsample, self.copied_frames = segment, upsample, copied_frames
        self.x = segment.double_time(source.x, upsample) if upsample.doubles_time else source.x
        self._copy: Tensor | None = None
        B, C, T, H, W = self.x.shape
        self.shape = torch.Size((B, C, T, 2 * H, 2 * W))
        # a row of the result (2W), and the part that is being copied into it (W)
        self.row_bytes = 3 * segment.bytes_of(B, C, T, 1, W)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.upsample.folded()

    def last_frames(self, frames: int) -> LazyUpsample:
        """The last frames alone, from one copy that all calls share."""
        if self._copy is None:
            self._copy = self.x[:, :, -self.copied_frames :].clone()
        part = copy(self)
        part.x = self._copy[:, :, -frames:]
        B, C, _, H, W = self.shape
        part.shape = torch.Size((B, C, frames, H, W))
        return part

    def __call__(self, lo: int, hi: int) -> Tensor:
        first, end = lo // 2, -(-hi // 2)
        above, below = min(first, 1), min(self.x.shape[3] - end, 1)
        x = self.x[:, :, :, first - above : end + below]
        y = self.upsample.double_space(x, self.weights, border=(not above, not below))
        return y[:, :, :, lo - 2 * first : hi - 2 * first]

    def peak_bytes(self, rows: int) -> int:
        small = self._small_rows(rows)
        B, C, T, _, W = self.x.shape
        quarter, padded = self.segment.bytes_of(B, C, T, small, W), self.segment.bytes_of(B, C, T, small + 2, W + 2)
        return self.result_bytes(rows) + quarter + padded

    def result_bytes(self, rows: int) -> int:
        B, C, T, _, W = self.shape
        return self.segment.bytes_of(B, C, T, 2 * self._small_rows(rows), W)

    def _small_rows(self, rows: int) -> int:
        return min(self.x.shape[3], rows // 2 + 1)
