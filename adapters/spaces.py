"""The table of latent spaces: shape of the grid, scale inside the sampler, convention of the pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kvae import KVAEConfig


@dataclass(frozen=True)
class LatentSpace:
    """What the latents of one VAE look like.

    `time` and `space` are frames and pixels per latent; `scaling_factor` multiplies a raw latent on its way into the
    sampler (None: the sampler takes raw latents, or none is published); `pixels` names the pixel convention of the VAE.
    """

    name: str
    channels: int
    time: int
    space: int
    scaling_factor: float | None
    pixels: str
    vae: str

    def scale(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents, as a VAE gives them, → as a sampler takes them."""
        return z_Bcthw if self.scaling_factor is None else z_Bcthw * self.scaling_factor

    def unscale(self, z_Bcthw: Tensor) -> Tensor:
        """A sampler's latents → raw latents, as a VAE takes them."""
        return z_Bcthw if self.scaling_factor is None else z_Bcthw / self.scaling_factor

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[c, t, h, w] of a video of 4n + 1 frames."""
        return self.channels, (frames - 1) // self.time + 1, height // self.space, width // self.space


SPACES = {
    space.name: space
    for space in (
        # HunyuanVideo, SkyReels, Kandinsky 5
        LatentSpace("hunyuan_video", 16, 4, 8, 0.476986, "x/127.5-1", "AutoencoderKLHunyuanVideo"),
        LatentSpace("hunyuan_video_1.5", 32, 4, 16, 1.03682, "x/127.5-1", "AutoencoderKLHunyuanVideo15"),
        LatentSpace("kvae_3d_1.0", 16, 4, 8, None, "x/128-1", "KVAE-3D-1.0"),
        LatentSpace("kvae_3d_2.0_t4s8", 16, 4, 8, None, "x/128-1", "KVAE-3D-2.0-t4s8"),
        LatentSpace("kvae_3d_2.0_t4s16", 64, 4, 16, 0.910344004631042, "x/128-1", "KVAE-3D-2.0-t4s16"),
    )
}


def space(name: str) -> LatentSpace:
    """The space of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SPACES:
        raise ValueError(f"no latent space is called {name!r}; the known ones are {', '.join(SPACES)}")
    return SPACES[name]


def native_space(config: KVAEConfig) -> LatentSpace:
    """The space of a KVAE's own latents: 1.0 has GroupNorm, 2.0 has not, and t4s16 has 64 channels.

    Raises:
        ValueError: no KVAE of the table has that grid.
    """
    if not config.norm_is_per_position:
        found = SPACES["kvae_3d_1.0"]
    else:
        found = SPACES["kvae_3d_2.0_t4s16" if config.z_channels == 64 else "kvae_3d_2.0_t4s8"]
    grid = config.z_channels, config.temporal_compress_times, config.spatial_factor
    if grid != (found.channels, found.time, found.space):
        raise ValueError(f"this KVAE has {grid[0]} channels of {grid[1]}x{grid[2]}x{grid[2]}; no known space has")
    return found
