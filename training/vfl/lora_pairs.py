"""The change that a LoRA makes to a layer, and what becomes of it where a network divides its layers otherwise.

# r rank; A [r, in], B [out, r]; a layer's weight changes by alpha / r · B A
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """The change of one layer. A and B are float32."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Lora = dict[str, Pair]  # by the name of the layer in diffusers


def halves_swapped(pair: Pair) -> Pair:
    return Pair(pair.a, torch.cat(pair.b.chunk(2)[::-1]), pair.alpha)


def fused(parts: dict[int, Pair]) -> Pair:
    """Three layers of one input as one: A on top of each other, B as blocks; a layer without a pair gets zeros."""
    first = next(iter(parts.values()))
    absent = Pair(first.a[:0], first.b[:, :0], 0)
    pairs = [parts.get(i, absent) for i in range(3)]
    b = torch.block_diag(*(pair.b * (pair.scale / first.scale) if pair.rank else pair.b for pair in pairs))
    a = torch.cat([pair.a for pair in pairs])
    return Pair(a, b, first.scale * len(a))


def split(pair: Pair) -> list[Pair]:
    """The inverse of `fused`. Where B is not made of blocks, all three layers share A."""
    rank, out = pair.rank // 3, pair.b.shape[0] // 3
    if pair.rank % 3 == 0:
        blocks = pair.b.view(3, out, 3, rank)
        if all(not blocks[i, :, j].any() for i in range(3) for j in range(3) if i != j):
            a = pair.a.chunk(3)
            return [Pair(a[i].clone(), blocks[i, :, i].clone(), pair.alpha / 3) for i in range(3)]
    return [Pair(pair.a, b.clone(), pair.alpha) for b in pair.b.chunk(3)]
