"""Rearrange latents between two grids, one finer by a whole factor in space: pixel_unshuffle and pixel_shuffle.

An adapter network works on one grid. Between spaces of two grids that is the coarser: a finer latent is unshuffled
before the network, and the result of the network is shuffled for a finer target. No value changes.

    # B batch, c channels, t latent frames, h/w latent rows and columns of the coarser grid, r the factor
    z_Bcthw
"""

from __future__ import annotations

from torch import Tensor


def unshuffled(z_Bcthw: Tensor, r: int) -> Tensor:
    """[B, c, t, r·h, r·w] → [B, c·r², t, h, w], in channels-last memory; for r = 1 the same tensor.

    Channel c·r² + r·i + j holds row i and column j of every block of r x r positions of channel c.
    """
    if r == 1:
        return z_Bcthw
    blocks = z_Bcthw.unflatten(4, (-1, r)).unflatten(3, (-1, r))  # B c t h i w j
    return blocks.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).movedim(4, 1)


def shuffled(z_Bcthw: Tensor, r: int) -> Tensor:
    """The inverse of `unshuffled`: [B, c·r², t, h, w] → [B, c, t, r·h, r·w], in channels-last memory."""
    if r == 1:
        return z_Bcthw
    blocks = z_Bcthw.unflatten(1, (-1, r, r))  # B c i j t h w
    return blocks.permute(0, 4, 5, 2, 6, 3, 1).flatten(4, 5).flatten(2, 3).movedim(4, 1)


def on_one_grid(z_h: Tensor, z_k: Tensor) -> tuple[Tensor, Tensor]:
    """Two latents [B, c, t, h, w] of one clip: the finer is unshuffled onto the grid of the coarser."""
    rows_h, rows_k = z_h.shape[3], z_k.shape[3]
    return unshuffled(z_h, max(1, rows_h // rows_k)), unshuffled(z_k, max(1, rows_k // rows_h))
