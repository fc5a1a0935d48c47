"""What a stream keeps from one segment to the next.

# B batch, C channels, lo:hi rows
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..layers import Cache
from .affine import ScaleShift
from .feature_map import Rows


class GroupNormStats(dict[tuple[int, str], ScaleShift]):
    """GroupNorm's statistics of a stream, by segment and layer: as scale and shift, [B, C, 1, 1, 1] each.

    Pass an empty one to a stream to record its statistics, and the same object to other streams to reuse them. With
    the statistics of the whole picture, its tiles are exact if they include the halo (`.tiles`); with those of a
    smaller copy of the picture, nearly so.
    """


@dataclass
class StreamState:
    """What a stream keeps from one segment to the next.

    Attributes:
        past_frames: by layer, the two frames before the next segment that its convolution reads, normalised.
        cache: what the resamplers keep; with gradients, what all layers keep.
        norm_stats: statistics of GroupNorm to record or to reuse.
        segments: number of segments that are done.
    """

    past_frames: dict[str, Rows] = field(default_factory=dict)
    cache: Cache = field(default_factory=dict)
    norm_stats: GroupNormStats | None = None
    segments: int = 0

    def close(self) -> None:
        """Forget the past. Frames that are recomputed refer to this state, so they would not be freed with it."""
        self.past_frames.clear()
        self.cache.clear()
