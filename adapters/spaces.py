"""The latent spaces: grid, scale inside the sampler, and pixel convention of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kvae import KVAEConfig


@dataclass(frozen=True)
class LatentSpace:
    """Properties of the latents of one VAE.

    Attributes:
        temporal_factor: frames per latent, after the first latent, which is one frame.
        spatial_factor: rows, and columns, of pixels per latent.
        scaling_factor: multiplies a raw latent on its way into the sampler. None: the sampler reads raw latents, or no
            factor is published.
        pixels: the pixel convention of the VAE, a formula of x in 0..255.
    """

    name: str
    channels: int
    temporal_factor: int
    spatial_factor: int
    scaling_factor: float | None
    pixels: str

    @property
    def raw_deviation(self) -> float | None:
        """The standard deviation of raw latents, where it tells them from a sampler's, which have 1; otherwise None."""
        if self.scaling_factor is None or 0.8 < self.scaling_factor < 1.25:
            return None
        return 1 / self.scaling_factor

    def scale(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents of a VAE → the scale inside a sampler."""
        return z_Bcthw if self.scaling_factor is None else z_Bcthw * self.scaling_factor

    def unscale(self, z_Bcthw: Tensor) -> Tensor:
        """A sampler's latents → raw latents for a VAE."""
        return z_Bcthw if self.scaling_factor is None else z_Bcthw / self.scaling_factor

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[c, t, h, w] of a video with 4n + 1 frames."""
        side = self.spatial_factor
        return self.channels, (frames - 1) // self.temporal_factor + 1, height // side, width // side

    def decoded_shape(self, z_shape: Sequence[int]) -> tuple[int, int, int, int, int]:
        """Latents of shape [B, c, t, h, w] → the shape [B, 3, T, H, W] of the video they decode to."""
        b, _, t, h, w = z_shape
        return b, 3, self.temporal_factor * (t - 1) + 1, self.spatial_factor * h, self.spatial_factor * w


# Scaling factors are the defaults of diffusers' VAEs, and of the published config of KVAE-3D-2.0-t4s16.
SPACES = {
    space.name: space
    for space in (
        # diffusers' AutoencoderKLHunyuanVideo, the VAE of HunyuanVideo, SkyReels and Kandinsky 5
        LatentSpace("hunyuan_video", 16, 4, 8, 0.476986, "x/127.5-1"),
        LatentSpace("hunyuan_video_1.5", 32, 4, 16, 1.03682, "x/127.5-1"),  # diffusers' AutoencoderKLHunyuanVideo15
        LatentSpace("kvae_3d_1.0", 16, 4, 8, None, "x/128-1"),
        LatentSpace("kvae_3d_2.0_t4s8", 16, 4, 8, None, "x/128-1"),
        LatentSpace("kvae_3d_2.0_t4s16", 64, 4, 16, 0.910344004631042, "x/128-1"),
    )
}


def latent_space(name: str) -> LatentSpace:
    """The latent space with this name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SPACES:
        raise ValueError(f"no latent space is called {name!r}; the known ones are {', '.join(SPACES)}")
    return SPACES[name]


def spatial_ratio(one: LatentSpace, other: LatentSpace) -> int | None:
    """Rows, and columns, of the finer grid for one of the coarser; 1 for equal grids.

    None: no adapter maps between the two. They have other frames per latent, or no whole number of rows.
    """
    coarser, finer = sorted((one.spatial_factor, other.spatial_factor), reverse=True)
    if one.temporal_factor != other.temporal_factor or coarser % finer:
        return None
    return coarser // finer


def fitting_spaces(shape: Sequence[int]) -> list[LatentSpace]:
    """The spaces whose latents can have this shape, most common first; none for an image latent."""
    if len(shape) != 5:
        return []
    return [space for space in SPACES.values() if space.channels == shape[1]]


def native_space(config: KVAEConfig) -> LatentSpace:
    """The space of a KVAE's own latents. 1.0 has GroupNorm, 2.0 has RMSNorm, and t4s16 has 64 channels.

    Raises:
        ValueError: the grid is not that of a published KVAE.
    """
    if not config.norm_is_per_position:
        found = SPACES["kvae_3d_1.0"]
    else:
        found = SPACES["kvae_3d_2.0_t4s16" if config.z_channels == 64 else "kvae_3d_2.0_t4s8"]
    grid = config.z_channels, config.temporal_compress_times, config.spatial_factor
    if grid != (found.channels, found.temporal_factor, found.spatial_factor):
        raise ValueError(
            f"this KVAE has {grid[0]} channels of {grid[1]}x{grid[2]}x{grid[2]}; no known space has this grid"
        )
    return found
