"""Principal components of 4x8x8 blocks of pixels: what the Hunyuan skeleton learns from, and a codec to compare with.

# B batch, T frames, t = (T + 3) / 4 latent frames, H/W pixels, h = H/8, w = W/8, f = 768 values of a block
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...kvae.pixels import HUNYUAN_HALF_RANGE, to_unit

COUNT = 16  # components of a block: as many as a latent has channels


def pixel_blocks(x_B3THW: Tensor) -> Tensor:
    """[B, 3, 4n + 1, H, W] → [B, n + 1, H/8, W/8, 768]: the 4x8x8 block of each latent, frame 0 four times over."""
    x = torch.cat([x_B3THW[:, :, :1].expand(-1, -1, 3, -1, -1), x_B3THW], dim=2)
    return rearrange(x, "b c (t i) (h j) (w k) -> b t h w (c i j k)", i=4, j=8, k=8)


def fit_components(blocks_Bthwf: Tensor, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Mean [f] and whitening projection [f, count] of blocks."""
    x = rearrange(blocks_Bthwf, "b t h w f -> (b t h w) f")
    mean = x.mean(0)
    covariance = ((x - mean).T @ (x - mean) / len(x)).cpu()  # Apple's GPUs have no float64
    values, vectors = torch.linalg.eigh(covariance.double())
    return mean, (vectors[:, -count:] / values[-count:].sqrt()).to(mean)


def pca_psnr(train: list[Tensor], validation: list[Tensor], count: int = COUNT) -> float:
    """Mean PSNR in dB of the codec that keeps the first components of each 4x8x8 block.

    Args:
        train: clips that the components are fitted to, uint8 [3, 4n + 1, H, W].
        validation: clips that are coded, likewise.
    """
    x = torch.cat([pixel_blocks(to_unit(clip[None], HUNYUAN_HALF_RANGE)).flatten(0, 3) for clip in train])
    mean, projection = fit_components(x[None, None, None], count)
    basis = F.normalize(projection, dim=0)
    psnrs = []
    for clip in validation:
        y = pixel_blocks(to_unit(clip[None], HUNYUAN_HALF_RANGE))
        error = (((y - mean) @ basis @ basis.T + mean).clamp(-1, 1) - y).square().mean((0, 2, 3, 4))
        # the first block holds one frame four times, the others four frames
        mse = (error[0] + 4 * error[1:].sum()) / (4 * len(error) - 3)
        psnrs.append(10 * math.log10(4 / mse.item()))
    return sum(psnrs) / len(psnrs)
