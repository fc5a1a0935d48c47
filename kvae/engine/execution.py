"""How to compute a clip: the choices that trade time for memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch

from ..config import SEGMENT_FRAMES
from .layout import is_nvidia

PAST_FRAMES = 2  # past frames that a causal 3x3x3 convolution reads


class Recompute(IntEnum):
    """Which feature maps are recomputed wherever they are read, instead of held in memory. Each level adds to the last.

    FULL_RESOLUTION also recomputes the past frames that convolutions at that resolution read, so segments must be long
    enough to hold them: see `frames_to_recompute`.
    """

    NOTHING = 0
    UPSAMPLED = 1  # the outputs of the upsamplers
    INNER = 2  # the maps between the two convolutions of each residual block
    FULL_RESOLUTION = 3  # all maps of the blocks at the resolution of the pixels


@dataclass(frozen=True)
class Execution:
    """How to compute a clip. The result is the same for all executions, unless tiles overlap.

    Attributes:
        segment: frames in each segment after the first, which has one more. Models with GroupNorm require 16.
        strip_bytes: approximate size of a convolution's input and output for one strip. None: what is fast on the
            device, see `strip_bytes_on`.
        recompute: which feature maps are recomputed instead of held in memory.
        tiles: number of rows and of columns of tiles. Each tile is computed for the whole clip before the next (see
            `.tiles`). Streams accept (1, 1) only.
        overlap: latents that neighbouring tiles share. Tiles are blended there, and the result is not exact. GroupNorm
            then uses the statistics of a copy of the clip, shrunk to the size of a tile. None: each tile includes the
            halo that makes it exact; models with GroupNorm have no such tiles.

    Raises:
        ValueError: a number is invalid for every model. What one model does not support, its methods refuse.
    """

    segment: int = SEGMENT_FRAMES
    strip_bytes: int | None = None
    recompute: Recompute = Recompute.NOTHING
    tiles: tuple[int, int] = (1, 1)
    overlap: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", tuple(self.tiles))
        if len(self.tiles) != 2:
            raise ValueError(f"tiles is {self.tiles}; expected rows and columns of tiles, such as (2, 3)")
        overlap = 0 if self.overlap is None else self.overlap
        strip_bytes = 1 if self.strip_bytes is None else self.strip_bytes
        numbers = [self.segment, strip_bytes, *self.tiles, self.recompute, overlap]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{self}; expected integers")
        if min(numbers[:4]) < 1:
            raise ValueError(f"{self}; expected segment, strip_bytes and tiles of at least 1")
        if self.recompute not in list(Recompute):
            names = ", ".join(f"{level.name} ({level:d})" for level in Recompute)
            raise ValueError(f"recompute is {self.recompute}; expected a level of Recompute: {names}")
        object.__setattr__(self, "recompute", Recompute(self.recompute))
        if overlap < 0:
            raise ValueError(f"overlap is {overlap}; expected 0 or more latents, or None for exact tiles")

    def strip_bytes_on(self, device: torch.device) -> int:
        """The size of strips on a device: larger on an NVIDIA GPU, which small strips would leave idle.

        Other GPUs may unfold a strip for a convolution, or limit a tensor's bytes.
        """
        return self.strip_bytes or (1 << 30 if is_nvidia(device) else 64 << 20)


Executions = Execution | Callable[[], Execution]  # one for all segments, or a function that is asked before each


def present(execution: Executions) -> Execution:
    """The execution for the next segment."""
    return execution if isinstance(execution, Execution) else execution()


def frames_to_recompute(blocks: int) -> int:
    """How many frames a segment must leave to the next, to recompute `blocks` blocks and one convolution's past."""
    return PAST_FRAMES + 4 * blocks  # each block has two convolutions
