"""The output of an encoder: a distribution over latents.

# B batch, c channels, t latent frames, h/w latent rows and columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents: `mean` and `logvar`, both [B, c, t, h, w], raw."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one latent [B, c, t, h, w], in the dtype of the mean.

        The log-variance is clamped to −30..20, as in diffusers (models/autoencoders/vae.py,
        DiagonalGaussianDistribution).
        """
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + noise * (0.5 * self.logvar.clamp(-30, 20)).exp()
