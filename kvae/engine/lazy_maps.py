"""Feature maps that are computed on demand, by rows, from other feature maps.

A 3x3 window needs one row beyond its strip. What a convolution reads is normalised straight into its padded input.

    # B batch, C channels, T frames, H/W rows and columns, lo:hi rows
    # x_BCTHW
"""

from __future__ import annotations

from copy import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import CausalConv3d, ResnetBlock, empty_in_layout_of, fill_border
from ..resample import Upsample
from .affine import NormAffine
from .convolution import conv3d
from .execution import PAST_FRAMES
from .feature_map import FeatureMap, Materialized, ReadRows
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
        B, _, T, H, W = source.shape
        self.shape = torch.Size((B, conv.conv.out_channels, T, H, W))
        self.segment, self.source, self.conv = segment, source, conv
        self.affine = self._affine(norm) if norm else None
        element = segment.element_size
        self.row_bytes = source.row_bytes + B * (source.shape[1] + self.shape[1]) * (T + 2) * (W + 2) * element
        self.lead_frames = 0  # frames of the source before those of the output
        self.past: ReadRows | None = segment.state.past_frames.pop(conv.name, None)
        self.next_past: Materialized | None = None
        recompute_past = recompute_past and T >= PAST_FRAMES
        self.collects_past = not (recompute_past or segment.last)
        if recompute_past and self.affine and not segment.last:
            past = LazyPast(source.last_frames(PAST_FRAMES), self.affine.last_frames(PAST_FRAMES, T))
            segment.state.past_frames[conv.name] = past

    def _affine(self, norm: nn.Module) -> NormAffine:
        state = self.segment.state
        stats, key = state.norm_stats, (state.segments, self.conv.name)
        known = stats.get(key) if stats else None
        strips = self.segment.strips(self.source)
        affine = NormAffine(norm, self.source, strips, self.segment.z_Bcthw, self.segment.first, known)
        if stats is not None and affine.shift is not None:
            stats[key] = affine.scale, affine.shift
        return affine

    def last_frames(self, frames: int) -> LazyConv:
        """The last frames alone. The source has the two frames before them, so no past is needed."""
        part = copy(self)
        part.source = self.source.last_frames(frames + PAST_FRAMES)
        part.affine = self.affine and self.affine.last_frames(frames + PAST_FRAMES, self.shape[2])
        part.lead_frames, part.past, part.collects_past = PAST_FRAMES, None, False
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
            F.silu(now, inplace=True)
        else:
            now.copy_(x)
        if not self.lead_frames:
            inner[:, :, :2] = now[:, :, :1] if self.past is None else self.past(lo - above, hi + below)
        if self.collects_past:
            self.next_past = self.next_past or Materialized(empty_in_layout_of(padded, (B, C, 2, H, W)))
            self.next_past.x[:, :, :, lo:hi] = padded[:, :, T:, 1:-1, 1:-1]
        fill_border(unfilled, self.conv.padding, (True, True, not above, not below))
        return conv3d(padded, self.conv.conv.weight, self.conv.conv.bias)

    def store_past(self) -> None:
        """Hand the collected frames to the stream's state; to be called once all rows have been computed."""
        if self.next_past is not None:
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
        B, C, T, _, W = self.shape
        self.row_bytes = B * C * T * W * outer.segment.element_size

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


class LazyPast:
    """The last frames of an earlier segment after norm and SiLU, on demand, with the statistics of that segment."""

    def __init__(self, source: FeatureMap, affine: NormAffine):
        self.source, self.affine = source, affine

    def __call__(self, lo: int, hi: int) -> Tensor:
        x = self.source(lo, hi)
        y = torch.empty_like(x)
        if self.affine.write_fused(x, lo, hi, out=y):
            return y
        self.affine.write(x, lo, hi, out=y)
        return F.silu(y, inplace=True)


class LazyUpsample:
    """An upsampler's output: rows and columns on demand. Frames are doubled beforehand, while pictures are still small.

    Args:
        copied_frames: the most frames that `last_frames` is asked for.
    """

    def __init__(self, segment: SegmentRun, source: FeatureMap, upsample: Upsample, copied_frames: int):
        self.upsample, self.weights, self.copied_frames = upsample, upsample.folded(), copied_frames
        x = source(0, source.shape[3])
        if "time_0" in self.weights:
            x = upsample.double_time(x, segment.state.cache, self.weights)
            if segment.last:
                segment.state.cache.pop(upsample.name)
        self.x = x
        self._copy: Tensor | None = None
        B, C, T, H, W = x.shape
        self.shape = torch.Size((B, C, T, 2 * H, 2 * W))
        # a row of the result (2W), and the part that is being copied into it (W)
        self.row_bytes = 3 * B * C * T * W * segment.element_size

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
