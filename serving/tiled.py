"""TiledVAE: a ServedVAE for hosts that ask for tiles of a size, blended where they overlap.

This takes less memory than any exact way, and is not exact (see `kvae.Execution`). Each tile is streamed through the
whole clip: tiles in time would cut what a causal VAE remembers, which flickers at their edges, and would save
nothing, as memory does not grow with the length. Adapters see the whole latent, never a tile.

# x_B3THW pixels in −1..1, z_Bcthw raw latents
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kvae import Execution, Plan, plan_decode, plan_encode
from .serve import ServedVAE

MOST_TILE = 512  # latents: 4096 pixels


class TiledVAE(ServedVAE):
    """A ServedVAE that also decodes and encodes by tiles."""

    def decode_tiled(self, z_Bcthw: Tensor, tile_x: int = 32, tile_y: int = 32, overlap: int = 8, **_: int) -> Tensor:
        """`decode` by tiles of so many latents at most, blended over at least `overlap` of them: not exact.

        What a host says of tiles in time is left out.

        Raises:
            ValueError, WeightsError, BudgetError, MemoryError: as `decode`; or the overlap leaves nothing of the tiles.
        """
        x = self._frames(z_Bcthw.shape)
        execution = self._tiles(plan_decode, z_Bcthw.shape, (tile_y, tile_x), overlap, side=1)
        return self._decode(x, z_Bcthw, (lambda: execution,))

    def encode_tiled(
        self, x_B3THW: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64, **_: int
    ) -> Tensor:
        """`encode` by tiles of so many pixels at most, blended over at least `overlap` of them: not exact.

        Raises:
            ValueError, WeightsError, BudgetError: as `encode`; or the overlap leaves nothing of the tiles.
        """
        x, side = self._whole(x_B3THW), self.space.space
        x = x[..., : x.shape[3] // side * side, : x.shape[4] // side * side]
        tile = tile_y // side, tile_x // side
        execution = self._tiles(plan_encode, x.shape, tile, overlap // side, side)
        return self._encode(x, (lambda: execution,))

    def _tiles(
        self, plan: Callable[..., Plan], shape: Sequence[int], tile: tuple[int, int], overlap: int, side: int
    ) -> Execution:
        """The way to compute tiles of so many latents, of a picture with `side` rows a latent."""
        sides = [n // side for n in shape[3:]]
        rows, columns = (tile_count(n, t, overlap) for n, t in zip(sides, tile, strict=True))
        largest = (side * min(n, t) for n, t in zip(sides, tile, strict=True))
        execution = self._execution(plan, (*shape[:3], *largest), stream=True)
        return replace(execution, tiles=(rows, columns), overlap=overlap)

    def preferred_decode_tile(self, free_memory: float, dtype: torch.dtype) -> int:
        """The side, in latents, of the largest square tile that decodes in half of so many bytes."""
        side = 0
        while side < MOST_TILE:
            plan = self._plan(plan_decode, (1, 1, 13, side + 8, side + 8), None)
            if self._scaled(plan, dtype) > free_memory / 2:
                break
            side += 8
        return side


def tile_count(n: int, tile: int, overlap: int) -> int:
    """How many tiles of at most `tile` latents cover n of them, with at least `overlap` in common.

    Raises:
        ValueError: the tiles would not get ahead.
    """
    if tile >= n >= 1:
        return 1
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} latents with {overlap} in common; expected larger tiles or less in common")
    return -(-(n - overlap) // (tile - overlap))
