"""Compute a segment without gradients: the result of the modules' own `forward`, in less memory and time.

Every layer runs by strips of rows. The statistics of a GroupNorm are gathered over all strips before the first strip is
normalised, so strips are exact. A block's output overwrites its inner feature map.

    # B batch, C channels, T frames, H/W rows and columns, lo:hi rows
    # x_BCTHW
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..coders import Decoder, Encoder
from ..layers import ResnetBlock, empty_in_layout_of
from ..resample import Downsample, Upsample
from .execution import PAST_FRAMES, Execution, Recompute, frames_to_recompute
from .feature_map import FeatureMap, Materialized
from .lazy_maps import LazyConv, LazyResBlock, LazyUpsample
from .segment import SegmentRun
from .stream_state import StreamState
from .strips import even_strips


def run_segment(
    coder: Encoder | Decoder, x_BCTHW: Tensor, state: StreamState, first: bool, last: bool, execution: Execution
) -> Tensor:
    """The result of `coder(x, cache)`: pixels → moments [B, 2c, t, h, w], or latents → pixels.

    Args:
        x_BCTHW: in the memory format of `in_fastest_format`.
        state: of the stream, which is updated.
        first, last: whether the segment starts or ends the stream.
    """
    decode = isinstance(coder, Decoder)
    segment = SegmentRun(execution, state, first, last, x_BCTHW.element_size(), x_BCTHW if decode else None)
    # the next segment may recompute maps of full resolution from the last frames of pixels
    source = Materialized(x_BCTHW, PAST_FRAMES + frames_to_recompute(len(coder.full_resolution())))
    start = LazyConv(segment, source, coder.conv_in, None)
    h = _run_stages(segment, segment.materialize(start) if decode else start, coder)
    start.store_past()
    y = _run_output(segment, h, coder)
    state.segments += 1
    return y


def in_fastest_format(x_BCTHW: Tensor) -> Tensor:
    """x in the memory format that is fastest to compute with: channels-last on a CPU."""
    cpu = x_BCTHW.device.type == "cpu"
    return x_BCTHW.contiguous(memory_format=torch.channels_last_3d) if cpu else x_BCTHW


def _run_stages(segment: SegmentRun, h: FeatureMap, coder: Encoder | Decoder) -> FeatureMap:
    """Run all blocks and resamplers of a coder."""
    recompute = segment.execution.recompute
    on_demand = coder.full_resolution() if recompute >= Recompute.FULL_RESOLUTION else ()
    stages = list(coder.stages())
    for i, stage in enumerate(stages):
        if stage in on_demand:
            inner = LazyConv(segment, h, stage.conv1, stage.norm1, recompute_past=True)
            h = LazyResBlock(LazyConv(segment, inner, stage.conv2, stage.norm2, recompute_past=True), stage)
        elif isinstance(stage, ResnetBlock):
            h = _run_block(segment, h, stage)
        elif isinstance(stage, Downsample):
            h = _run_downsample(segment, h, stage)
        elif isinstance(stage, Upsample):
            copied = frames_to_recompute(len(on_demand)) if stages[i + 1] in on_demand else PAST_FRAMES
            h = LazyUpsample(segment, h, stage, copied)
            h = h if recompute >= Recompute.UPSAMPLED else segment.materialize(h)
    return h


def _run_block(segment: SegmentRun, source: FeatureMap, block: ResnetBlock) -> Materialized:
    """Compute a block's output, in the memory of its inner feature map or of its input if one has the same shape."""
    inner: FeatureMap
    upsampled = isinstance(source, LazyUpsample)
    inner = first = LazyConv(segment, source, block.conv1, block.norm1, recompute_past=upsampled)
    if segment.execution.recompute < Recompute.INNER:
        inner = segment.materialize(inner)
    outer = LazyConv(segment, inner, block.conv2, block.norm2)
    into = next((m for m in (inner, source) if isinstance(m, Materialized) and m.shape == outer.shape), None)
    y = segment.materialize(outer, into, add=lambda lo, hi: block.shortcut(source(lo, hi)))
    first.store_past()
    outer.store_past()
    return y


def _run_downsample(segment: SegmentRun, source: FeatureMap, layer: Downsample) -> Materialized:
    """Halve the rows and columns, and the frames if the layer does, by strips."""
    w, cache = layer.folded(), segment.state.cache
    B, _, T, H, W = source.shape
    past = cache.pop(layer.name, None)
    next_past: list[Tensor] = []
    y = None
    row_bytes = max(source.row_bytes, B * source.shape[1] * T * W * segment.element_size)
    for lo, hi in even_strips(H // 2, segment.execution.strip_bytes // (2 * row_bytes)):
        above = min(lo, 1)
        part = layer.halve_space(source(2 * lo - above, 2 * hi), w, border=not above)
        if hasattr(layer, "temporal_conv"):
            strip_cache = {} if past is None else {layer.name: past[:, :, :, lo:hi]}
            part = layer.halve_time(part, strip_cache, w)
            next_past.append(strip_cache.pop(layer.name))
        y = empty_in_layout_of(part, (*part.shape[:3], H // 2, W // 2)) if y is None else y
        y[:, :, :, lo:hi] = part
        del part  # before the next one is made
    if next_past and not segment.last:
        cache[layer.name] = torch.cat(next_past, dim=3)
    assert y is not None
    return Materialized(y)


def _run_output(segment: SegmentRun, h: FeatureMap, coder: Encoder | Decoder) -> Tensor:
    """The last norm and convolution."""
    on_demand = isinstance(h, LazyResBlock | LazyUpsample)
    out = LazyConv(segment, h, coder.conv_out, coder.norm_out, recompute_past=on_demand)
    x = segment.materialize(out).x
    out.store_past()
    return x
