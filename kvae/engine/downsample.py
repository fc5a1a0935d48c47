"""A downsampler by strips of rows, and the memory that this takes.

# B batch, C channels, T frames, H/W rows and columns, lo:hi rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..resample import Downsample
from .feature_map import FeatureMap, Materialized
from .layout import empty_in_layout_of
from .strips import even_strips, largest_strip

if TYPE_CHECKING:
    from .count import CountedRun
    from .segment import SegmentRun


def run(segment: SegmentRun, source: FeatureMap, layer: Downsample) -> Materialized:
    """Halve the rows and columns, and the frames if the layer does, by strips."""
    w, cache = layer.folded(), segment.state.cache
    H, W = source.shape[3] // 2, source.shape[4] // 2
    past = cache.pop(layer.name, None)
    next_past: list[Tensor] = []
    y = None
    for lo, hi in even_strips(H, _rows(segment, source)):
        above = min(lo, 1)
        part = layer.halve_space(source(2 * lo - above, 2 * hi), w, border=not above)
        if layer.halves_time:
            strip_cache = {} if past is None else {layer.name: past[:, :, :, lo:hi]}
            part = layer.halve_time(part, strip_cache, w)
            next_past.append(strip_cache.pop(layer.name))
        y = empty_in_layout_of(part, (*part.shape[:3], H, W)) if y is None else y
        y[:, :, :, lo:hi] = part
        del part  # before the next one is made
    if next_past and not segment.last:
        cache[layer.name] = torch.cat(next_past, dim=3)
    assert y is not None
    return Materialized(y)


def count(segment: CountedRun, source: FeatureMap, layer: Downsample) -> Materialized:
    """Count the memory of `run`."""
    B, C, T, _, W = source.shape
    H, W = source.shape[3] // 2, W // 2
    past = segment.state.cache.pop(layer.name, None)
    rows = largest_strip(H, _rows(segment, source))
    asked = min(source.shape[3], 2 * rows + 1)
    channels = layer.linear.in_channels
    padded = segment.bytes_of(B, C, T, 2 * rows + 1, 2 * W + 1)
    peak = max(
        source.peak_bytes(asked),
        source.result_bytes(asked) + padded + segment.bytes_of(B, channels, T, rows, W),
    )
    y = segment.empty((B, channels, (T + 1) // 2 if layer.halves_time else T, H, W))
    result = segment.bytes_of(B, channels, y.shape[2], rows, W)
    kept = 0
    if layer.halves_time:
        # strip by strip first, in the last segment too, and then in one piece
        next_past = segment.empty((B, channels, 1, H, W))
        kept = 0 if segment.last else segment.bytes_of(B, channels, 1, H, W)
        alone_and_with_its_past = segment.bytes_of(B, channels, T + T + 2, rows, W)
        peak = max(peak, alone_and_with_its_past + result)
        if not segment.last:
            segment.state.cache[layer.name] = next_past
    segment.ledger.touch(max(peak, result, kept))
    del past  # it was in use until now
    return Materialized(y)


def _rows(segment: SegmentRun, source: FeatureMap) -> int:
    """Rows of the result in a strip."""
    B, C, T, _, W = source.shape
    return segment.rows_in_a_strip(2 * max(source.row_bytes, segment.bytes_of(B, C, T, 1, W)))
