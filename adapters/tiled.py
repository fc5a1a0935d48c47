"""TiledVAE: a ServedVAE for hosts that ask for tiles of a size, blended where they overlap.

That takes less memory than any exact way, and is not exact. GroupNorm takes the same statistics in every tile: those of
a smaller version of the picture, from a pass of its own. Each tile is streamed through the whole clip: tiles in time
would cut what a causal VAE remembers, which flickers at their edges, and would save nothing, as memory does not grow
with the length. Adapters see the whole latent, never a tile.

# x_B3THW pixels in −1..1, z_Bcthw raw latents; along one axis, n latents and a span lo:hi of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kvae import Method, Norms, plan_decode, plan_encode
from ..kvae.tiles import Span
from .hybrid import from_kvae_pixels, to_kvae_pixels
from .inspect import check_latent
from .serve import ServedVAE

MOST_TILE = 512  # latents: 4096 pixels


class TiledVAE(ServedVAE):
    """A ServedVAE that also decodes and encodes by tiles."""

    def decode_tiled(self, z_Bcthw: Tensor, tile_x: int = 32, tile_y: int = 32, overlap: int = 8, **_: int) -> Tensor:
        """`decode` by tiles of so many latents, blended over `overlap` of them: not exact.

        What a host says of tiles in time is left out.

        Raises:
            ValueError, WeightsError, BudgetError, MemoryError: as `decode`; or the overlap leaves nothing of the tiles.
        """
        x = self._frames(z_Bcthw.shape)
        check_latent(z_Bcthw, self.space)
        rows, columns = (tile_spans(z_Bcthw.shape[d], tile, overlap) for d, tile in ((3, tile_y), (4, tile_x)))
        report = self._progress(len(x) * len(rows) * len(columns) * z_Bcthw.shape[2])
        for clip, z in zip(x.split(1), z_Bcthw.split(1), strict=True):
            z_k = self.vae.to_kvae(self._place(z))
            method = self._method(plan_decode, (*z.shape[:3], rows[0][1], columns[0][1]))
            norms = self._norms(self.kvae.decode_stream, z_k, rows, columns, method)
            decode = partial(self.kvae.decode_stream, method=method, norms=norms)

            def frames(
                rows: Span, columns: Span, z_k: Tensor = z_k, decode: Callable[[Tensor], Iterator[Tensor]] = decode
            ) -> Iterator[Tensor]:
                for part in decode(z_k[..., slice(*rows), slice(*columns)]):
                    yield from_kvae_pixels(part)
                    report(-(-part.shape[2] // self.space.time))

            blend(clip, rows, columns, self.space.space, frames)
        return x

    def encode_tiled(
        self, x_B3THW: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64, **_: int
    ) -> Tensor:
        """`encode` by tiles of so many pixels, blended over `overlap` of them: not exact.

        Raises:
            ValueError, WeightsError, BudgetError: as `encode`; or the overlap leaves nothing of the tiles.
        """
        self.vae.check_encodes()
        x, side = self._whole(x_B3THW), self.space.space
        t, h, w = (x.shape[2] - 1) // self.space.time + 1, x.shape[3] // side, x.shape[4] // side
        rows, columns = tile_spans(h, tile_y // side, overlap // side), tile_spans(w, tile_x // side, overlap // side)
        report = self._progress(len(x) * len(rows) * len(columns) * t)
        method = self._method(plan_encode, (*x.shape[:3], rows[0][1] * side, columns[0][1] * side))

        def encode_one(clip: Tensor) -> Tensor:
            clip = to_kvae_pixels(self._place(clip))
            norms = self._norms(self.kvae.encode_stream, clip, rows, columns, method)

            def latents(rows: Span, columns: Span) -> Iterator[Tensor]:
                part = clip[..., side * rows[0] : side * rows[1], side * columns[0] : side * columns[1]]
                for posterior in self.kvae.encode_stream(part, method, norms=norms):
                    yield posterior.mean
                    report(posterior.mean.shape[2])

            z_k = torch.empty(1, self.kvae.config.z_channels, t, h, w, device=clip.device)
            blend(z_k, rows, columns, 1, latents)
            return self.vae.from_kvae(z_k)

        return torch.cat([encode_one(clip) for clip in x.split(1)])

    def _norms(
        self, stream: Callable[..., Iterator], x: Tensor, rows: list[Span], columns: list[Span], method: Method
    ) -> Norms | None:
        """For the tiles of what `stream` takes: the statistics of a version of it no larger than a tile."""
        shrink = max(spans[-1][1] / spans[0][1] for spans in (rows, columns))
        if shrink == 1 or self.kvae.config.per_position:
            return None
        side = x.shape[3] // rows[-1][1]  # of a latent, in what the stream takes
        sides = (side * max(1, int(spans[-1][1] / shrink)) for spans in (rows, columns))
        small = F.interpolate(x.float(), (x.shape[2], *sides), mode="area")
        norms = Norms()
        for _ in stream(small, method, norms=norms):
            pass
        return norms

    def preferred_decode_tile(self, free_memory: float, dtype: torch.dtype) -> int:
        """The side, in latents, of the largest square tile that decodes in half of so many bytes."""
        side = 0
        while side < MOST_TILE:
            plan = self._plan(plan_decode, (1, 1, 13, side + 8, side + 8), None)
            if self._scaled(plan, dtype) > free_memory / 2:
                break
            side += 8
        return side


def tile_spans(n: int, tile: int, overlap: int) -> list[Span]:
    """Spans of at most `tile` latents that cover 0:n, evenly spread, with at least `overlap` in common.

    Raises:
        ValueError: the tiles would not get ahead.
    """
    tile = min(n, tile)
    if tile < 1 or (tile < n and not 0 <= overlap < tile):
        raise ValueError(f"tiles of {tile} latents with {overlap} in common; expected larger tiles or less in common")
    count = 1 if tile == n else -(-(n - overlap) // (tile - overlap))
    starts = [round(i * (n - tile) / max(1, count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def feathers(spans: list[Span], scale: int) -> list[Tensor]:
    """The weights of each span's values, `scale` of them a latent: ramps where spans overlap, and 1 in all."""
    ramps, total = [], torch.zeros(spans[-1][1] * scale)
    for i, (lo, hi) in enumerate(spans):
        ramp = torch.ones((hi - lo) * scale)
        before = (spans[i - 1][1] - lo) * scale if i else 0
        after = (hi - spans[i + 1][0]) * scale if i + 1 < len(spans) else 0
        ramp[:before] = torch.arange(1, before + 1) / (before + 1)
        ramp[len(ramp) - after :] *= torch.arange(after, 0, -1) / (after + 1)
        ramps.append(ramp)
        total[lo * scale : hi * scale] += ramp
    return [ramp / total[lo * scale : hi * scale] for ramp, (lo, hi) in zip(ramps, spans, strict=True)]


def blend(
    out: Tensor, rows: list[Span], columns: list[Span], scale: int, stream: Callable[[Span, Span], Iterator[Tensor]]
) -> None:
    """Fill [1, C, T, H, W], `scale` values a latent, with what `stream` gives of each tile, from the first frame on."""
    out.zero_()
    for (top, bottom), down in zip(rows, feathers(rows, scale), strict=True):
        for (left, right), across in zip(columns, feathers(columns, scale), strict=True):
            weights = (down[:, None] * across).to(out)
            tile = out[..., top * scale : bottom * scale, left * scale : right * scale]
            start = 0
            for part in stream((top, bottom), (left, right)):
                tile[:, :, start : start + part.shape[2]] += part.to(out) * weights
                start += part.shape[2]
