"""Fit clips to a VAE: repeat the last frame, row and column up to a size that it accepts, and cut clips into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.nn.functional as F
from torch import Tensor


def padded_frames(frames: int, temporal_factor: int = 4) -> int:
    """The smallest temporal_factor·n + 1 that is not below `frames`; temporal_factor is in frames per latent."""
    return frames + (1 - frames) % temporal_factor


def pad_frames(x_BCTHW: Tensor, temporal_factor: int = 4) -> Tensor:
    """Repeat the last frame of x [B, C, T, H, W] up to temporal_factor·n + 1 frames."""
    return padded(x_BCTHW, padded_frames(x_BCTHW.shape[2], temporal_factor), 1)


def padded(x_BCTHW: Tensor, frames: int, multiple: int) -> Tensor:
    """Repeat the last frame up to `frames`, and the last row and column up to a multiple of `multiple`.

    This makes one copy, or none if nothing is missing.
    """
    T, H, W = x_BCTHW.shape[2:]
    missing = (0, -W % multiple, 0, -H % multiple, 0, frames - T)
    return F.pad(x_BCTHW, missing, mode="replicate") if any(missing) else x_BCTHW


def pieces_of(x_BCTHW: Tensor, first: int, rest: int) -> Iterator[Tensor]:
    """Yield views of `first`, `rest`, `rest` … frames; the last one may be shorter."""
    yield x_BCTHW[:, :, :first]
    for start in range(first, x_BCTHW.shape[2], rest):
        yield x_BCTHW[:, :, start : start + rest]


def regroup(chunks: Iterable[Tensor], first: int, rest: int) -> Iterator[Tensor]:
    """Yield pieces of `first`, `rest`, `rest` … frames from chunks [B, C, n, H, W]; the last one may be shorter.

    Every piece is a copy, so a reader may reuse the memory of a chunk for the next one.

    Raises:
        ValueError: a chunk differs from the first in more than its number of frames.
    """
    length, count = first, 0
    piece: Tensor | None = None
    sides: tuple[int, ...] | None = None
    for chunk in chunks:
        B, C, _, H, W = chunk.shape
        sides = sides or (B, C, H, W)
        if sides != (B, C, H, W):
            raise ValueError(f"a chunk has shape {list(chunk.shape)}; expected that of the others, {_like(sides)}")
        while chunk.shape[2]:
            if piece is None:
                piece = chunk.new_empty(B, C, length, H, W)
            part, chunk = chunk[:, :, : length - count], chunk[:, :, length - count :]
            piece[:, :, count : count + part.shape[2]] = part
            count += part.shape[2]
            if count == length:
                full, piece = piece, None
                yield full
                del full
                length, count = rest, 0
    if piece is not None:
        yield piece[:, :, :count]


def _like(sides: tuple[int, ...]) -> str:
    B, C, H, W = sides
    return f"[{B}, {C}, T, {H}, {W}]"


def with_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each item with whether it is the last one."""
    iterator = iter(items)
    for held in iterator:
        for item in iterator:
            yield held, False
            held = item
        yield held, True
