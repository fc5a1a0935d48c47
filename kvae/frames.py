"""Frames, rows and columns that a VAE takes: any other clip repeats its last ones, and is cut again after decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_frames(frames: int, cadence: int = 4) -> int:
    """The next cadence·n + 1."""
    return frames + (1 - frames) % cadence


def pad_frames(x_BCTHW: Tensor, cadence: int = 4, first: bool = True) -> Tensor:
    """Repeat the last frame up to the next cadence·n + 1 frames; to cadence·n where others went before."""
    missing = (first - x_BCTHW.shape[2]) % cadence
    if not missing:
        return x_BCTHW
    return torch.cat([x_BCTHW, x_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def pad_sides(x_BCTHW: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column up to the next multiples."""
    bottom, right = (-side % multiple for side in x_BCTHW.shape[3:])
    return F.pad(x_BCTHW, (0, right, 0, bottom, 0, 0), mode="replicate") if bottom or right else x_BCTHW


def regroup(chunks: Iterable[Tensor], first: int, rest: int) -> Iterator[Tensor]:
    """Chunks of any length, [B, C, n, H, W] → pieces of `first`, `rest`, `rest` … frames, the last one shorter."""
    length, pending, count = first, list[Tensor](), 0
    for chunk in chunks:
        while chunk.shape[2]:
            part, chunk = chunk[:, :, : length - count], chunk[:, :, length - count :]
            pending.append(part)
            count += part.shape[2]
            if count == length:
                yield _joined(pending)
                length, pending, count = rest, [], 0
    if pending:
        yield _joined(pending)


def with_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    for held in iterator:
        for item in iterator:
            yield held, False
            held = item
        yield held, True


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
