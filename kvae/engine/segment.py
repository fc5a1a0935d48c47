"""One segment on its way through a coder.

# B batch, C channels, T frames, H/W rows and columns, lo:hi rows
# x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..layers import empty_in_layout_of
from .execution import Execution
from .feature_map import FeatureMap, Materialized, ReadRows
from .stream_state import StreamState
from .strips import even_strips


@dataclass
class SegmentRun:
    """The run of one segment: what all its layers need to know.

    Attributes:
        state: of the stream. It is read, and updated unless this is the `last` segment.
        first, last: whether the segment starts or ends the stream.
        element_size: bytes of one value.
        z_Bcthw: the latent that conditions the norms, in the decoder.
    """

    execution: Execution
    state: StreamState
    first: bool
    last: bool
    element_size: int
    z_Bcthw: Tensor | None = None

    def strips(self, source: FeatureMap) -> Iterator[tuple[int, int]]:
        """Bounds (lo, hi) of strips that need about `Execution.strip_bytes` each."""
        yield from even_strips(source.shape[3], self.execution.strip_bytes // max(1, source.row_bytes))

    def materialize(
        self, source: FeatureMap, into: Materialized | None = None, add: ReadRows | None = None
    ) -> Materialized:
        """Compute all rows of a map, plus those of `add`, into new memory or over a map that they are computed from.

        Each strip is written after the next one has been computed, since that one may still read what is overwritten.
        """
        out = into.x if into else None
        pending: list[tuple[int, int, Tensor]] = []

        def write() -> None:
            lo, hi, strip = pending.pop()
            assert out is not None
            out[:, :, :, lo:hi] = strip

        for lo, hi in self.strips(source):
            strip = source(lo, hi)
            if add:
                strip += add(lo, hi)
            if (lo, hi) == (0, source.shape[3]):
                return Materialized(strip)
            if out is None:
                out = empty_in_layout_of(strip, source.shape)
            if pending:
                write()
            pending.append((lo, hi, strip))
        write()
        assert out is not None
        return Materialized(out)
