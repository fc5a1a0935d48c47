"""Tiles of a picture: exact ones, where no norm runs over the picture, or ones that are blended where they overlap.

An exact tile is computed with all that its values depend on, and that halo is then dropped: 18 latents to decode, 14 to
encode, with two blocks a level. Blended tiles have a few latents in common, where each counts less towards its edge.

    # lo:hi along one axis, in latents, pixels, or whatever the stage at hand counts in
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from ..config import KVAEConfig

Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A piece of a result: `x`, [B, C, T, H, W], belongs at `where`, or is added there times `weights`, [H, W]."""

    x: Tensor
    where: tuple[slice, ...]
    weights: Tensor | None = None

    def put(self, out: Tensor) -> None:
        """Into the whole result, which must start as zeros where there are weights."""
        if self.weights is None:
            out[self.where] = self.x
        else:
            out[self.where] += (self.x * self.weights.to(self.x.device)).to(out)


@dataclass(frozen=True)
class Cut:
    """A tile along an axis: the latents it is computed from; which of its values are kept, and where; their weights."""

    outer: Span
    crop: slice
    where: slice
    weights: Tensor | None


@dataclass(frozen=True)
class Axis:
    """How latents are cut: what is computed together, and what of that is the result; None where tiles are blended."""

    outer: list[Span]
    inner: list[Span] | None = None

    def cuts(self, scale: int) -> Iterator[Cut]:
        """The tiles, for results of `scale` values a latent."""
        weights = self.weights(scale) if self.inner is None else [None] * len(self.outer)
        for outer, inner, weight in zip(self.outer, self.inner or self.outer, weights, strict=True):
            lo, hi, start = (side * scale for side in (*inner, outer[0]))
            yield Cut(outer, slice(lo - start, hi - start), slice(lo, hi), weight)

    def weights(self, scale: int) -> list[Tensor]:
        """What each value of blended tiles counts for: ramps where they overlap, and 1 in all; float32."""
        ramps, total = [], torch.zeros(self.outer[-1][1] * scale)
        for i, (lo, hi) in enumerate(self.outer):
            ramp = torch.ones((hi - lo) * scale)
            before = (self.outer[i - 1][1] - lo) * scale if i else 0
            after = (hi - self.outer[i + 1][0]) * scale if i + 1 < len(self.outer) else 0
            ramp[:before] = torch.arange(1, before + 1) / (before + 1)
            ramp[len(ramp) - after :] *= torch.arange(after, 0, -1) / (after + 1)
            ramps.append(ramp)
            total[lo * scale : hi * scale] += ramp
        return [ramp / total[lo * scale : hi * scale] for ramp, (lo, hi) in zip(ramps, self.outer, strict=True)]


@dataclass(frozen=True)
class Tiling:
    """Rows and columns of tiles.

    Attributes:
        largest: rows and columns, in latents, of the largest tile.
        work: what is computed in all, in pictures.
    """

    rows: Axis
    columns: Axis

    @property
    def largest(self) -> tuple[int, int]:
        rows, columns = (max(hi - lo for lo, hi in axis.outer) for axis in (self.rows, self.columns))
        return rows, columns

    @property
    def work(self) -> float:
        return prod(sum(hi - lo for lo, hi in axis.outer) / axis.outer[-1][1] for axis in (self.rows, self.columns))

    def __len__(self) -> int:
        return len(self.rows.outer) * len(self.columns.outer)

    def parts(self, stream: Callable[[Span, Span], Iterator[Tensor]], scale: int) -> Iterator[Part]:
        """What `stream` gives of each tile, segment by segment, as parts of a result with `scale` values a latent."""
        rows, columns = (list(axis.cuts(scale)) for axis in (self.rows, self.columns))
        for row, column in product(rows, columns):
            weights = None if row.weights is None or column.weights is None else row.weights[:, None] * column.weights
            start = 0
            for x in stream(row.outer, column.outer):
                time = slice(start, start + x.shape[2])
                where = slice(None), slice(None), time, row.where, column.where
                yield Part(x[..., row.crop, column.crop], where, weights)
                start = time.stop


def exact_tiling(config: KVAEConfig, h: int, w: int, counts: tuple[int, int], decode: bool) -> Tiling:
    """Tiles of nearly equal size, counts[0] rows of counts[1] each, with the halo that makes them exact.

    Raises:
        ValueError: GroupNorm runs over the whole picture, so no tile is exact.
    """
    if counts != (1, 1) and not config.per_position:
        raise ValueError("tiles cannot be exact where GroupNorm runs over the whole picture; this model has it")
    needs = needed_to_decode if decode else needed_to_encode

    def axis(n: int, count: int) -> Axis:
        inner = spans(n, count)
        return Axis([within(needs(config, span), n) for span in inner], inner)

    return Tiling(axis(h, counts[0]), axis(w, counts[1]))


def blended_tiling(h: int, w: int, counts: tuple[int, int], overlap: int) -> Tiling:
    """Tiles of equal size, counts[0] rows of counts[1] each, that have at least `overlap` latents in common."""
    return Tiling(*(Axis(overlapping(n, count, overlap)) for n, count in zip((h, w), counts, strict=True)))


def overlapping(n: int, count: int, overlap: int) -> list[Span]:
    """So many spans of one size that cover 0:n, evenly spread; fewer where they would not get ahead."""
    count = max(1, min(count, n - overlap))
    size = -(-(n + (count - 1) * overlap) // count)
    starts = [round(i * (n - size) / max(1, count - 1)) for i in range(count)]
    return [(start, start + size) for start in starts]


def within(span: Span, size: int) -> Span:
    """The part of a span that is in the picture."""
    return max(0, span[0]), min(size, span[1])


def spans(size: int, count: int) -> list[Span]:
    """So many nearly equal parts; fewer where there is not one latent for each."""
    count = min(size, count)
    return list(pairwise(size * i // count for i in range(count + 1)))


def needed_to_decode(config: KVAEConfig, latents: Span) -> Span:
    """The latents that the pixels of these latents depend on."""
    lo, hi = (side * config.spatial_factor for side in latents)
    lo, hi = lo - 1, hi + 1  # conv_out
    levels = len(config.decoder_widths)
    for level in range(levels):
        reach = 2 * (config.num_res_blocks + 1)  # of the blocks, two convolutions each
        lo, hi = lo - reach, hi + reach
        if level < levels - 1:
            lo, hi = (lo - 1) // 2, -(-(hi + 1) // 2)  # one pixel beyond, of the doubled picture
    return lo - 5, hi + 5  # the two blocks in the middle, and conv_in


def needed_to_encode(config: KVAEConfig, latents: Span) -> Span:
    """The latents whose pixels these latents depend on."""
    lo, hi = latents
    lo, hi = lo - 5, hi + 5  # conv_out, and the two blocks in the middle
    levels = len(config.encoder_widths)
    for level in range(levels):
        reach = 2 * config.num_res_blocks
        lo, hi = lo - reach, hi + reach
        if level < levels - 1:
            lo, hi = 2 * lo - 1, 2 * hi  # a window of three, centred on the first of each two
    lo, hi = lo - 1, hi + 1  # conv_in
    return lo // config.spatial_factor, -(-hi // config.spatial_factor)
