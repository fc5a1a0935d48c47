"""Cut a picture into tiles: exact ones, if no norm runs over the picture, or ones that are blended where they overlap.

An exact tile is computed with a halo of all that its values depend on, and the halo is then dropped: 18 latents to
decode, 14 to encode, with two encoder blocks a level. Blended tiles share a few latents; there, the weight of each tile
falls towards its edge.

    # lo:hi along one axis, in latents unless a comment says otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from ..config import KVAEConfig
from ..layers import wide

Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A piece of a result: `x`, [B, C, T, H, W], belongs at `where`, or is added there times `weights`, [H, W]."""

    x: Tensor
    where: tuple[slice, ...]
    weights: Tensor | None = None

    def put(self, out: Tensor) -> None:
        """Write `x` into the full result, which must start as zeros if there are weights."""
        if self.weights is None:
            out[self.where] = self.x
        else:
            place = out[self.where]
            place.copy_(place + (self.x * self.weights.to(self.x.device)).to(out))


def whole_pictures(stream: Iterator[Tensor]) -> Iterator[Part]:
    """The segments of a stream [B, C, T, H, W], as parts."""
    start = 0
    for x in stream:
        yield Part(x, (slice(None), slice(None), slice(start, start + x.shape[2]), slice(None), slice(None)))
        start += x.shape[2]
        del x  # before the next one is computed


@dataclass(frozen=True)
class AxisTile:
    """A tile along one axis.

    Attributes:
        outer: the latents that the tile is computed from.
        crop: which of the computed values are kept.
        where: the place of the kept values in the result.
        weights: of the kept values, if tiles are blended.
    """

    outer: Span
    crop: slice
    where: slice
    weights: Tensor | None


@dataclass(frozen=True)
class Axis:
    """The tiles along one axis: the latents that each is computed from, and the latents that each results in.

    `inner` is None if tiles are blended: then everything that is computed is part of the result.
    """

    outer: list[Span]
    inner: list[Span] | None = None

    def tiles(self, scale: int) -> Iterator[AxisTile]:
        """The tiles, for results with `scale` values per latent."""
        weights = self.blend_weights(scale) if self.inner is None else [None] * len(self.outer)
        for outer, inner, weight in zip(self.outer, self.inner or self.outer, weights, strict=True):
            lo, hi, start = (side * scale for side in (*inner, outer[0]))
            yield AxisTile(outer, slice(lo - start, hi - start), slice(lo, hi), weight)

    def blend_weights(self, scale: int) -> list[Tensor]:
        """The weight of each value of blended tiles, float32: ramps where tiles overlap, with a sum of 1 everywhere."""
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
        work: number of latents that all tiles are computed from, divided by that of the picture.
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
        """The segments of each tile in turn, as parts of a result with `scale` values per latent.

        Args:
            stream: computes the segments of the tile with these rows and columns of latents.
        """
        rows, columns = (list(axis.tiles(scale)) for axis in (self.rows, self.columns))
        for row, column in product(rows, columns):
            weights = None if row.weights is None or column.weights is None else row.weights[:, None] * column.weights
            start = 0
            for x in stream(row.outer, column.outer):
                time = slice(start, start + x.shape[2])
                where = slice(None), slice(None), time, row.where, column.where
                yield Part(x[..., row.crop, column.crop], where, weights)
                start = time.stop


def exact_tiling(config: KVAEConfig, h: int, w: int, counts: tuple[int, int], decode: bool) -> Tiling:
    """counts[0] rows of counts[1] tiles of nearly equal size, each with the halo that makes it exact.

    Raises:
        ValueError: GroupNorm runs over the whole picture, so no tile is exact.
    """
    if counts != (1, 1) and not config.norm_is_per_position:
        raise ValueError(
            "this model has GroupNorm over the whole picture, so tiles cannot be exact; set an overlap to blend them"
        )
    needed = needed_to_decode if decode else needed_to_encode

    def axis(n: int, count: int) -> Axis:
        inner = even_spans(n, count)
        return Axis([clipped(needed(config, span), n) for span in inner], inner)

    return Tiling(axis(h, counts[0]), axis(w, counts[1]))


def blended_tiling(h: int, w: int, counts: tuple[int, int], overlap: int) -> Tiling:
    """counts[0] rows of counts[1] tiles of equal size, neighbours of which share at least `overlap` latents."""
    return Tiling(*(Axis(overlapping_spans(n, count, overlap)) for n, count in zip((h, w), counts, strict=True)))


def shrink_to_tile(x: Tensor, tiling: Tiling, side: int) -> Tensor:
    """Shrink a clip [B, C, T, H, W], with `side` rows per latent, to the largest tile, for GroupNorm's statistics."""
    sides = [axis.outer[-1][1] for axis in (tiling.rows, tiling.columns)]
    factor = max(n / tile for n, tile in zip(sides, tiling.largest, strict=True))
    rows, columns = (
        means(n * side, max(1, int(n / factor)) * side, x.device, torch.promote_types(x.dtype, torch.float32))
        for n in sides
    )
    # as two products of matrices, since Apple's GPU has no pooling of 5-D maps
    return (rows @ (wide(x) @ columns.T)).to(x.dtype)


def means(n: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix [count, n] that averages n values to `count`, each over its share, as `F.interpolate(mode="area")`."""
    i, j = torch.arange(count, device=device)[:, None], torch.arange(n, device=device)
    shares = ((j >= i * n // count) & (j * count < (i + 1) * n)).to(dtype)
    return shares / shares.sum(1, keepdim=True)


def overlapping_spans(n: int, count: int, overlap: int) -> list[Span]:
    """`count` evenly spaced spans of one size that cover 0:n; fewer if each would not start after the one before."""
    count = max(1, min(count, n - overlap))
    size = -(-(n + (count - 1) * overlap) // count)
    starts = [round(i * (n - size) / max(1, count - 1)) for i in range(count)]
    return [(start, start + size) for start in starts]


def even_spans(size: int, count: int) -> list[Span]:
    """`count` nearly equal parts of 0:size; fewer if there are fewer latents than parts."""
    count = min(size, count)
    return list(pairwise(size * i // count for i in range(count + 1)))


def clipped(span: Span, size: int) -> Span:
    """The part of a span that lies in 0:size."""
    return max(0, span[0]), min(size, span[1])


def needed_to_decode(config: KVAEConfig, latents: Span) -> Span:
    """The latents that the pixels of these latents depend on; may reach beyond the picture."""
    lo, hi = (side * config.spatial_factor for side in latents)
    lo, hi = lo - 1, hi + 1  # conv_out
    levels = len(config.decoder_widths)
    for level in range(levels):
        reach = 2 * (config.num_res_blocks + 1)  # two convolutions per block
        lo, hi = lo - reach, hi + reach
        if level < levels - 1:
            lo, hi = (lo - 1) // 2, -(-(hi + 1) // 2)  # the upsampler's window, one pixel beyond the doubled picture
    return lo - 5, hi + 5  # the two blocks in the middle, and conv_in


def needed_to_encode(config: KVAEConfig, latents: Span) -> Span:
    """The latents whose pixels these latents depend on; may reach beyond the picture."""
    lo, hi = latents
    lo, hi = lo - 5, hi + 5  # conv_out, and the two blocks in the middle
    levels = len(config.encoder_widths)
    for level in range(levels):
        reach = 2 * config.num_res_blocks
        lo, hi = lo - reach, hi + reach
        if level < levels - 1:
            lo, hi = 2 * lo - 1, 2 * hi  # a window of three pixels, centred on the first of each pair
    lo, hi = lo - 1, hi + 1  # conv_in
    return lo // config.spatial_factor, -(-hi // config.spatial_factor)
