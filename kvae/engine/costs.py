"""What feature maps that are computed on demand hold meanwhile: a class for each class of `kvae.engine.strips`.

Counted are the tensors that are made, in bytes, at the moment when there are most of them.

    # B batch, C channels, T frames, H/W rows and columns, t/h/w of the latent
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..layers import ResnetBlock
from . import winograd
from .rows import largest_strip


@dataclass(frozen=True)
class Scene:
    """What is the same for all maps of a segment.

    Attributes:
        item, unit: bytes of one value, and of one value for all clips of the batch.
        first: whether the segment starts the stream, so that nothing is remembered.
        rms: whether the norms are RMS norms.
        latent: frames, rows and columns of the latent that conditions the norms, in the decoder.
    """

    item: int
    unit: int
    strip_bytes: int
    first: bool
    rms: bool
    latent: tuple[int, int, int] | None

    def norm(self, channels: int, T: int, rows: int, H: int, W: int, tail: bool = False) -> int:
        """What normalising so many rows, of H, takes beside input and output."""
        norms = self.unit * T * rows * W if self.rms else 0
        if not self.latent:
            return norms
        t, h, w = self.latent
        covered = min(h, -(-rows * h // H) + 1)  # rows of the latent
        scales = t * ((3 * self.item + 8) * covered + 2 * self.item * rows)  # and repeated for each row
        scales += 2 * self.item * rows * (T + t) if tail else 0  # and for each frame
        return max(norms, self.unit // self.item * channels * w * scales)


class Map(Protocol):
    """A feature map that is asked for by rows."""

    scene: Scene
    channels: int
    T: int
    H: int
    W: int
    row_bytes: int  # as that of the map itself, from which the height of strips follows

    def peak(self, rows: int) -> int:
        """The most bytes in use while so many rows are computed, these included."""

    def result(self, rows: int) -> int:
        """Bytes of them."""

    def tail(self, frames: int) -> Map:
        """The last frames alone."""


class HeldMap:
    """In memory, and counted there."""

    row_bytes = 0

    def __init__(self, scene: Scene, channels: int, T: int, H: int, W: int):
        self.scene, self.channels, self.T, self.H, self.W = scene, channels, T, H, W
        self.bytes = scene.unit * channels * T * H * W

    def peak(self, rows: int) -> int:
        return 0

    def result(self, rows: int) -> int:
        return 0

    def tail(self, frames: int) -> HeldMap:
        return HeldMap(self.scene, self.channels, frames, self.H, self.W)


class UpsampledMap:
    """Rows and columns of a smaller map in memory, doubled."""

    def __init__(self, small: HeldMap):
        self.small, self.scene = small, small.scene
        self.channels, self.T, self.H, self.W = small.channels, small.T, 2 * small.H, 2 * small.W
        self.row_bytes = 3 * self.scene.unit * self.channels * self.T * small.W

    def _small(self, rows: int) -> int:
        return min(self.small.H, rows // 2 + 1)

    def peak(self, rows: int) -> int:
        small, W = self._small(rows), self.small.W
        quarter, framed = small * W, (small + 2) * (W + 2)
        return self.result(rows) + self.scene.unit * self.channels * self.T * (quarter + framed)

    def result(self, rows: int) -> int:
        return self.scene.unit * self.channels * self.T * 2 * self._small(rows) * self.W

    def tail(self, frames: int) -> UpsampledMap:
        return UpsampledMap(self.small.tail(frames))


class ConvolvedMap:
    """A convolution of another map, normalised where `normed`.

    Args:
        again: whether its past is computed again, from the tail of the same map.
        tail: whether it is itself the tail of a map, which starts two frames into its source.
    """

    def __init__(self, source: Map, conv: nn.Conv3d, normed: bool, again: bool = False, tail: int | None = None):
        self.source, self.conv, self.normed, self.scene = source, conv, normed, source.scene
        self.channels, self.T, self.H, self.W = conv.out_channels, tail or source.T, source.H, source.W
        self.past = source.tail(2) if again and not self.scene.first and tail is None else None
        self.tailed = tail is not None
        both = source.channels + self.channels
        self.row_bytes = source.row_bytes + self.scene.unit * both * (self.T + 2) * (self.W + 2)

    def peak(self, rows: int) -> int:
        asked = min(self.H, rows + 2)
        return self.after(rows, self.source.peak(asked), self.source.result(asked))

    def after(self, rows: int, peak: int, source: int) -> int:
        """The peak, where computing the rows of the source has one of its own, and leaves so many bytes."""
        scene, W, C = self.scene, self.W, self.source.channels
        rows, asked = min(self.H, rows), min(self.H, rows + 2)
        padded = scene.unit * C * (self.T + 2) * (rows + 2) * (W + 2)
        read = self.T + 2 if self.tailed else self.T
        norm = scene.norm(C, read, asked, self.H, W, self.tailed) if self.normed else 0
        work = self.result(rows) + winograd.workspace(self.conv.weight, self.T, rows, W)
        return max(peak, source + padded + max(norm, work, self._remembered(asked)))

    def _remembered(self, rows: int) -> int:
        """While the past is computed again."""
        if self.past is None:
            return 0
        y = self.scene.unit * self.past.channels * 2 * rows * self.W
        norm = self.scene.norm(self.past.channels, 2, rows, self.H, self.W, tail=True)
        return max(self.past.peak(rows), self.past.result(rows) + y + norm)

    def result(self, rows: int) -> int:
        return self.scene.unit * self.channels * self.T * min(self.H, rows) * self.W

    def tail(self, frames: int) -> ConvolvedMap:
        return ConvolvedMap(self.source.tail(frames + 2), self.conv, self.normed, tail=frames)


class SummedMap:
    """A block's output, from its second convolution; what both branches read is computed once for both."""

    def __init__(self, outer: ConvolvedMap, block: ResnetBlock):
        assert isinstance(outer.source, ConvolvedMap)
        self.outer, self.inner, self.block = outer, outer.source, block
        self.source, self.scene = self.inner.source, outer.scene
        self.channels, self.T, self.H, self.W = outer.channels, outer.T, outer.H, outer.W
        self.row_bytes = self.scene.unit * self.channels * self.T * self.W

    def peak(self, rows: int) -> int:
        within, asked = min(self.H, rows + 2), min(self.H, rows + 4)
        x, y = self.source.result(asked), self.result(rows)
        inner = self.inner.after(within, 0, 0)
        outer = self.outer.after(rows, inner, self.inner.result(within))
        return max(self.source.peak(asked), x + max(outer, y + shortcut(self.block, y)))

    def result(self, rows: int) -> int:
        return self.outer.result(rows)

    def tail(self, frames: int) -> SummedMap:
        return SummedMap(self.outer.tail(frames), self.block)


def shortcut(block: ResnetBlock, y: int) -> int:
    """What a block's shortcut makes for y bytes of the result: nothing where it is the input itself."""
    return y if hasattr(block, "nin_shortcut") else 0


def strip_of(rows: Map) -> int:
    """Rows of the highest strip that `kvae.engine.strips.Segment.strips` makes of it."""
    return largest_strip(rows.H, rows.scene.strip_bytes // max(1, rows.row_bytes))
