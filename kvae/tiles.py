"""Exact tiles for the models whose norm is per position (2.0): a tile is computed with all that its values depend on.

What a stage reads beyond what it writes is known, so the halo of a tile is counted, not guessed: 18 latents to decode
and 14 to encode with the published models. At the picture's own edges there is none, and the border is the model's.

    # lo:hi along one axis, in latents, pixels, or whatever the stage at hand counts in
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from .config import KVAEConfig

Span = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """A tile of a picture of h x w latents: `inner` is what it answers for, `outer` what must be computed with it.

    Both are (rows, columns) in latents.
    """

    inner: tuple[Span, Span]
    outer: tuple[Span, Span]


def tiles(config: KVAEConfig, h: int, w: int, counts: tuple[int, int], decode: bool) -> Iterator[Tile]:
    """Tiles of nearly equal size, counts[0] rows of counts[1] each.

    Raises:
        ValueError: GroupNorm runs over the whole picture, so no tile is exact.
    """
    if counts != (1, 1) and not config.per_position:
        raise ValueError("tiles cannot be exact where GroupNorm runs over the whole picture; this model has it")
    needs = needed_to_decode if decode else needed_to_encode
    for rows in spans(h, counts[0]):
        for columns in spans(w, counts[1]):
            outer = within(needs(config, rows), h), within(needs(config, columns), w)
            yield Tile((rows, columns), outer)


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
