"""Compute a segment without gradients: the result of the modules' own `forward`, in less memory and time.

Every layer runs by strips of rows. The statistics of a GroupNorm are gathered over all strips before the first strip is
normalised, so strips are exact. A block's output overwrites its inner feature map.

    # B batch, C channels, T frames, H/W rows and columns, lo:hi rows
    # x_BCTHW
"""

from __future__ import annotations

from torch import Tensor, nn

from ..coders import Coder, Decoder
from ..layers import ResnetBlock
from ..resample import Downsample, Upsample
from .execution import PAST_FRAMES, Execution, Recompute, frames_to_recompute
from .feature_map import FeatureMap, Materialized
from .layout import fastest_format
from .lazy_maps import LazyConv, LazyResBlock, LazyUpsample, Shortcut
from .segment import SegmentRun
from .stream_state import StreamState


def run_segment(
    coder: Coder, x_BCTHW: Tensor, state: StreamState, first: bool, last: bool, execution: Execution
) -> Tensor:
    """The result of `coder(x, cache)`: pixels → moments [B, 2c, t, h, w], or latents → pixels.

    Args:
        x_BCTHW: in the memory format `fastest_format` of its device.
        state: of the stream, which is updated.
        first, last: whether the segment starts or ends the stream.
    """
    device = x_BCTHW.device
    segment = SegmentRun(execution, state, first, last, x_BCTHW.dtype, device, fastest_format(device))
    return run_stages(segment, x_BCTHW, coder)


def run_stages(segment: SegmentRun, x_BCTHW: Tensor, coder: Coder) -> Tensor:
    """Run all layers of a coder, in the order of the modules' own `forward`."""
    decode = isinstance(coder, Decoder)
    segment.z_Bcthw = x_BCTHW if decode else None
    # the next segment may recompute maps of full resolution from the last frames of pixels
    source = Materialized(x_BCTHW, PAST_FRAMES + frames_to_recompute(len(coder.full_resolution())))
    start = LazyConv(segment, source, coder.conv_in, None)
    h: FeatureMap = segment.materialize(start) if decode else start
    on_demand = coder.full_resolution() if segment.execution.recompute >= Recompute.FULL_RESOLUTION else ()
    stages: list[nn.Module] = list(coder.stages())
    for i, stage in enumerate(stages):
        if isinstance(stage, ResnetBlock) and stage in on_demand:
            inner = LazyConv(segment, h, stage.conv1, stage.norm1, recompute_past=True)
            h = LazyResBlock(LazyConv(segment, inner, stage.conv2, stage.norm2, recompute_past=True), stage)
        elif isinstance(stage, ResnetBlock):
            h = _run_block(segment, h, stage)
        elif isinstance(stage, Downsample):
            h = segment.downsample(h, stage)
        elif isinstance(stage, Upsample):
            assert isinstance(h, Materialized)
            copied = frames_to_recompute(len(on_demand)) if stages[i + 1] in on_demand else PAST_FRAMES
            h = LazyUpsample(segment, h, stage, copied)
            if segment.execution.recompute < Recompute.UPSAMPLED:
                h = segment.materialize(h)
    start.store_past()
    read_on_demand = isinstance(h, LazyResBlock | LazyUpsample)
    out = LazyConv(segment, h, coder.conv_out, coder.norm_out, recompute_past=read_on_demand)
    y = segment.materialize(out).x
    out.store_past()
    segment.state.segments += 1
    return y


def _run_block(segment: SegmentRun, source: FeatureMap, block: ResnetBlock) -> Materialized:
    """Compute a block's output, in the memory of its inner feature map or of its input if one has the same shape."""
    inner: FeatureMap
    upsampled = isinstance(source, LazyUpsample)
    inner = first = LazyConv(segment, source, block.conv1, block.norm1, recompute_past=upsampled)
    if segment.execution.recompute < Recompute.INNER:
        inner = segment.materialize(inner)
    outer = LazyConv(segment, inner, block.conv2, block.norm2)
    into = next((m for m in (inner, source) if isinstance(m, Materialized) and m.shape == outer.shape), None)
    y = segment.materialize(outer, into, add=Shortcut(source, block, outer))
    first.store_past()
    outer.store_past()
    return y
