"""Affine maps between latent spaces, in closed form, in one pass over the pairs.

    ridge = Ridge(16, 16, kernel=3)
    for z_source, z_target in pairs:
        ridge.add(z_source, z_target)
    affine = ridge.solve()

Only sums are kept (433 x 433 numbers for 16 channels and 3x3x3), so memory does not grow with the pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...adapters.networks import Affine

RIDGE = 1e-4  # penalty relative to each feature's variance; keeps weights of near-equal neighbours from cancelling


class Ridge:
    """Running sums of a ridge regression of each target value on its causal neighbourhood in the source.

    Args:
        kernel: size of the neighbourhood along t, h and w: 1 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        features = in_channels * kernel**3
        self.count = 0
        self.sum_x = torch.zeros(features, dtype=torch.float64)
        self.sum_y = torch.zeros(out_channels, dtype=torch.float64)
        self.sum_yy = torch.zeros(out_channels, dtype=torch.float64)
        self.sum_xx = torch.zeros(features, features, dtype=torch.float64)
        self.sum_xy = torch.zeros(features, out_channels, dtype=torch.float64)

    def add(self, source_Bcthw: Tensor, target_Bcthw: Tensor) -> None:
        """Add paired latents, [B, c, t, h, w] and [B, c', t, h, w], on any device."""
        x = self._neighbourhoods(source_Bcthw.float())
        y = rearrange(target_Bcthw.float(), "b c t h w -> (b t h w) c")
        # float32 products within a clip, float64 sums over clips: as good as float64 throughout, and much faster. The
        # float64 sums are on the CPU, since Apple's GPUs have no float64
        self.count += len(x)
        self.sum_x += x.sum(0).cpu().double()
        self.sum_y += y.sum(0).cpu().double()
        self.sum_yy += y.square().sum(0).cpu().double()
        self.sum_xx += (x.T @ x).cpu().double()
        self.sum_xy += (x.T @ y).cpu().double()

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the other processes.

        Args:
            total: returns the sum of a float64 vector over all processes.
        """
        sums = [self.sum_x, self.sum_y, self.sum_yy, self.sum_xx, self.sum_xy]
        mine = [torch.tensor([self.count], dtype=torch.float64), *(each.flatten() for each in sums)]
        count, *parts = total(torch.cat(mine)).split([len(each) for each in mine])
        self.count = int(count)
        for each, part in zip(sums, parts, strict=True):
            each.copy_(part.view_as(each))

    def solve(self) -> Affine:
        """The affine map of least squared error, with a small ridge penalty.

        Raises:
            ValueError: there are fewer positions than unknowns.
        """
        if self.count <= len(self.sum_x):
            raise ValueError(f"{self.count} latent positions cannot fix {len(self.sum_x)} weights; add more clips")
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        cov_xx = self.sum_xx / self.count - mean_x.outer(mean_x)
        cov_xy = self.sum_xy / self.count - mean_x.outer(mean_y)
        cov_xx += torch.diag(RIDGE * cov_xx.diagonal().clamp(min=1e-12))
        weight = torch.linalg.solve(cov_xx, cov_xy).T
        affine = Affine(self.in_channels, self.out_channels, self.kernel)
        conv = affine.affine.conv
        with torch.no_grad():
            conv.weight.copy_(weight.reshape(conv.weight.shape))
            conv.bias.copy_(mean_y - weight @ mean_x)  # type: ignore[union-attr]
        return affine

    def target_variance(self) -> float:
        """Variance of the targets around each channel's mean, averaged over channels."""
        return (self.sum_yy / self.count - (self.sum_y / self.count).square()).mean().item()

    def target_square(self) -> float:
        """Mean square of the targets."""
        return (self.sum_yy / self.count).mean().item()

    def target_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each target channel, [c', 1, 1, 1] float32."""
        mean = self.sum_y / self.count
        std = (self.sum_yy / self.count - mean.square()).clamp(min=1e-12).sqrt()
        return mean.float()[:, None, None, None], std.float()[:, None, None, None]

    def _neighbourhoods(self, z_Bcthw: Tensor) -> Tensor:
        """[B, c, t, h, w] → [B·t·h·w, c·k³], padded as CausalConv3d pads."""
        k = self.kernel
        if k > 1:
            z_Bcthw = F.pad(z_Bcthw, (k // 2,) * 4 + (k - 1, 0), mode="replicate")
        windows = z_Bcthw.unfold(2, k, 1).unfold(3, k, 1).unfold(4, k, 1)
        return rearrange(windows, "b c t h w kt kh kw -> (b t h w) (c kt kh kw)")
