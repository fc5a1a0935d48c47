"""One segment on its way through a coder: what its layers share, and all that makes tensors of a map's size.

# B batch, C channels, T frames, H/W rows and columns, lo:hi rows
# x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..layers import RMSNorm, SpatialNorm
from ..resample import Downsample, Upsample
from . import downsample
from .affine import NormAffine, ScaleShift, rms_scale
from .execution import Execution
from .feature_map import FeatureMap, Materialized, Rows
from .statistics import group_affine
from .stream_state import StreamState
from .strips import even_strips


@dataclass
class SegmentRun:
    """The run of one segment: what all its layers need to know. `.count` adds up the memory of such a run.

    Attributes:
        state: of the stream. It is read, and updated unless this is the `last` segment.
        first, last: whether the segment starts or ends the stream.
        dtype, device, memory_format: of all feature maps.
        z_Bcthw: the latent that conditions the norms, in the decoder.
    """

    execution: Execution
    state: StreamState
    first: bool
    last: bool
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format
    z_Bcthw: Tensor | None = None

    def bytes_of(self, *sides: int) -> int:
        """Bytes of a tensor with these sides."""
        return self.dtype.itemsize * prod(sides)

    def strips(self, source: FeatureMap) -> Iterator[tuple[int, int]]:
        """Bounds (lo, hi) of strips that need about `Execution.strip_bytes` each."""
        yield from even_strips(source.shape[3], self.rows_in_a_strip(source.row_bytes))

    def rows_in_a_strip(self, row_bytes: int) -> int:
        """How many rows of this many bytes fit a strip."""
        return self.execution.strip_bytes_on(self.device) // max(1, row_bytes)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An empty feature map."""
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format)

    def affine(self, norm: nn.Module, source: FeatureMap, name: str) -> NormAffine:
        """The norm before the layer of that name, as scale and shift."""
        inner = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
        if isinstance(inner, RMSNorm):
            return NormAffine(norm, source.shape[3], self.z_Bcthw, self.first, self.rms(inner))
        assert isinstance(inner, nn.GroupNorm)
        stats, key = self.state.norm_stats, (self.state.segments, name)
        scale_shift = (stats and stats.get(key)) or self.statistics(inner, source)
        if stats is not None:
            stats[key] = scale_shift
        return NormAffine(norm, source.shape[3], self.z_Bcthw, self.first, scale_shift)

    def rms(self, norm: RMSNorm) -> ScaleShift:
        """The scale of an RMS norm, which has no shift."""
        return rms_scale(norm), None

    def statistics(self, norm: nn.GroupNorm, source: FeatureMap) -> ScaleShift:
        """GroupNorm over the whole map, as scale and shift."""
        return group_affine(norm, source, self.strips(source))

    def materialize(
        self, source: FeatureMap, into: Materialized | None = None, add: Rows | None = None
    ) -> Materialized:
        """Compute all rows of a map, plus those of `add`, into new memory or over a map that they are computed from.

        Each strip is written after the next one has been computed, since that one may still read what is overwritten.
        """
        out = into.x if into else None
        pending: list[tuple[int, int, Tensor]] = []

        def write() -> None:
            lo, hi, strip = pending.pop()
            assert out is not None
            if add and self.device.type != "mps":  # see NormAffine.write
                torch.add(strip, add(lo, hi), out=out[:, :, :, lo:hi])
            else:
                out[:, :, :, lo:hi] = strip.add_(add(lo, hi)) if add else strip

        for lo, hi in self.strips(source):
            strip = source(lo, hi)
            if (lo, hi) == (0, source.shape[3]):
                if add:
                    strip += add(lo, hi)
                return Materialized(strip)
            if out is None:
                out = self.empty(source.shape)
            if pending:
                write()
            pending.append((lo, hi, strip))
        del strip  # it is pending
        write()
        assert out is not None
        return Materialized(out)

    def double_time(self, x_BCTHW: Tensor, upsample: Upsample) -> Tensor:
        """[B, C, T, H, W] → [B, C, 2T, H, W], one frame less at the start of a stream."""
        y = upsample.double_time(x_BCTHW, self.state.cache, upsample.folded())
        if self.last:
            self.state.cache.pop(upsample.name)
        return y

    def downsample(self, source: FeatureMap, layer: Downsample) -> Materialized:
        """Halve the rows and columns, and the frames if the layer does."""
        return downsample.run(self, source, layer)
