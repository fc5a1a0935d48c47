"""Principal components of blocks of pixels: what the Hunyuan skeletons start from, and a codec to compare with.

A block is what one latent stands for: 4 frames of 8x8 or 16x16 pixels, the `side`.

# B batch, T frames, t = (T + 3) / 4 latent frames, H/W pixels, h = H/side, w = W/side
# f values of a block: 3 colours of 4 * side * side
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from ...kvae.pixels import HUNYUAN_HALF_RANGE, to_unit


def pixel_blocks(x_B3THW: Tensor, side: int) -> Tensor:
    """[B, 3, 4n + 1, H, W] → [B, n + 1, h, w, f]: the block of each latent; the first holds frame 0 four times."""
    x = torch.cat([x_B3THW[:, :, :1].expand(-1, -1, 3, -1, -1), x_B3THW], dim=2)
    return rearrange(x, "b c (t i) (h j) (w k) -> b t h w (c i j k)", i=4, j=side, k=side)


def principal_axes(blocks_Nf: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [f], variances [count] and orthonormal axes [f, count] of blocks that come in parts; largest last."""
    total, first, second = 0, torch.zeros(()), torch.zeros(())
    for x in blocks_Nf:
        total, first, second = total + len(x), first.to(x) + x.sum(0), second.to(x) + x.T @ x
    mean = first / total
    covariance = (second / total - torch.outer(mean, mean)).cpu()  # Apple's GPUs have no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # as exact as eigh to 1e-12, and 16 times as fast for 32 axes of 3072
        vectors, values, _ = torch.svd_lowrank(covariance.double(), min(len(mean), 2 * count + 32), niter=4)
    return mean, values[:count].flip(0).to(mean), vectors[:, :count].flip(1).to(mean)


def fit_components(blocks_Bthwf: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [f] and whitening projection [f, count] of blocks."""
    mean, variances, axes = principal_axes([blocks_Bthwf.flatten(0, 3)], count)
    return mean, axes / variances.sqrt()


def pca_psnr(train: list[Tensor], validation: list[Tensor], side: int, count: int) -> float:
    """Mean PSNR in dB of the codec that keeps the first components of each block.

    Args:
        train: clips that the components are fitted to, uint8 [3, 4n + 1, H, W].
        validation: clips that are coded, likewise.
        side: rows and columns of a block.
        count: number of components.
    """

    def blocks(clip: Tensor) -> Tensor:
        return pixel_blocks(to_unit(clip[None], HUNYUAN_HALF_RANGE), side)

    mean, _, axes = principal_axes((blocks(clip).flatten(0, 3) for clip in train), count)
    psnrs = []
    for clip in validation:
        y = blocks(clip)
        error = (((y - mean) @ axes @ axes.T + mean).clamp(-1, 1) - y).square().mean((0, 2, 3, 4))
        # the first block holds one frame four times, the others four frames
        mse = (error[0] + 4 * error[1:].sum()) / (4 * len(error) - 3)
        psnrs.append(10 * math.log10(4 / mse.item()))
    return sum(psnrs) / len(psnrs)
