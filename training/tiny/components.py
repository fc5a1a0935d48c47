"""Principal components of blocks of pixels: what small VAEs are trained beside, and a codec to compare with.

A block is what one latent, or one position between pixels and latents, stands for: some frames of `side` x `side`
pixels. As in the VAEs, a clip's first frame has blocks of its own; it is repeated to fill them.

# B batch, T frames, t = (T - 1) / frames + 1, H/W pixels, h = H/side, w = W/side
# f values of a block: 3 colours of frames * side * side
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ...kvae.pixels import HUNYUAN_HALF_RANGE, to_unit


def repeat_first(x_BCTHW: Tensor, count: int) -> Tensor:
    """[B, C, T, H, W] → [B, C, count + T - 1, H, W]: the first frame `count` times."""
    return torch.cat([x_BCTHW[:, :, :1].expand(-1, -1, count - 1, -1, -1), x_BCTHW], dim=2)


def pixel_blocks(x_B3THW: Tensor, side: int, frames: int = 4) -> Tensor:
    """[B, 3, T, H, W] → [B, t, h, w, f]: blocks of pixels; the first holds frame 0 `frames` times."""
    x = repeat_first(x_B3THW, frames)
    return rearrange(x, "b c (t i) (h j) (w k) -> b t h w (c i j k)", i=frames, j=side, k=side)


@dataclass(frozen=True)
class LinearCodec:
    """Blocks of pixels ↔ channels: principal components, scaled and rotated.

    Attributes:
        frames, side: size of a block.
        fold: 2x2x2 blocks lie side by side in the channels for 2, as DC-AE's downsamplers put them; 1 for one block.
        mean_f: mean of the blocks.
        encoder_fc, decoder_cf: matrices to and from the c channels of a block.
    """

    frames: int
    side: int
    fold: int
    mean_f: Tensor
    encoder_fc: Tensor
    decoder_cf: Tensor

    def encode(self, x_B3THW: Tensor) -> Tensor:
        """Pixels in −1..1 → [B, C, t, h, w]."""
        blocks = pixel_blocks(x_B3THW, self.side, self.frames)
        y = ((blocks - self.mean_f.to(blocks)) @ self.encoder_fc.to(blocks)).movedim(-1, 1)
        n = self.fold
        return rearrange(repeat_first(y, n), "b c (t i) (h j) (w k) -> b (i j k c) t h w", i=n, j=n, k=n)

    def decode(self, y_BCthw: Tensor) -> Tensor:
        """[B, C, t, h, w] → pixels [B, 3, T, H, W], with the first frame as often as its block holds it."""
        n = self.fold
        y = rearrange(y_BCthw.float(), "b (i j k c) t h w -> b (t i) (h j) (w k) c", i=n, j=n, k=n)
        blocks = y @ self.decoder_cf.to(y) + self.mean_f.to(y)
        i, j = self.frames, self.side
        return rearrange(blocks, "b t h w (c i j k) -> b c (t i) (h j) (w k)", i=i, j=j, k=j)


def fit_codec(
    clips_B3THW: Iterable[Tensor], frames: int, side: int, channels: int, generator: torch.Generator, fold: int = 1
) -> LinearCodec:
    """The codec of as many principal components as a block has channels, or values if those are fewer.

    Components are scaled halfway to unit variance, so that loud ones stay loud, and are then rotated.

    Args:
        clips_B3THW: pixels in −1..1 to fit to.
        channels: of the codec, those of fold³ blocks.
        generator: decides the rotation.
    """
    channels //= fold**3
    count = min(channels, 3 * frames * side * side)
    blocks = (pixel_blocks(clip, side, frames).flatten(0, 3) for clip in clips_B3THW)
    mean, variances, axes = principal_axes(blocks, count)
    deviations = variances.sqrt()
    scale = deviations.sqrt() * deviations.mean().sqrt()
    rotation = nn.init.orthogonal_(torch.empty(count, channels), generator=generator).to(axes)
    return LinearCodec(frames, side, fold, mean, (axes / scale) @ rotation, rotation.T @ (axes * scale).T)


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
