"""The two VAEs of a pair behind one interface: uint8 frames in, raw latents out, and back.

# B batch, T frames, t latent frames, H/W pixels, h/w latent rows and columns
x_B3THW uint8 frames, z_Bcthw raw float32 latents, y_B3THW float32 pixels 0..255
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapters.spaces import SPACES, LatentSpace, grid_of, latent_space, native_space, spatial_ratio
from ..kvae import KVAE, WeightsError, load_kvae, pad_frames
from ..kvae.find import find_weights
from ..kvae.paths import sha256_of
from ..kvae.pixels import HUNYUAN_HALF_RANGE, KVAE_HALF_RANGE, from_unit, to_unit
from ..kvae.signature import signature
from .errors import UserError
from .hunyuan import read_hunyuan_vae
from .hunyuan_whole import see_whole_clips

ASSETS = Path(__file__).parent / "tiny" / "assets"
# Options name them by "tiny" in the place of the first word here: --hunyuan-vae tiny-1.5 --kvae tiny-t4s16
TINY = {
    "hunyuan": ASSETS / "tiny_hunyuan.safetensors",
    "kvae": ASSETS / "tiny_kvae.safetensors",
    "hunyuan-1.5": ASSETS / "tiny_hunyuan15.safetensors",
    "kvae-t4s16": ASSETS / "tiny_kvae_t4s16.safetensors",
}
OPTIONS = {"hunyuan": "--hunyuan-vae", "kvae": "--kvae"}
TINY_ADAPTERS = {
    "h2k": ASSETS / "tiny_hunyuan_to_kvae.safetensors",
    "k2h": ASSETS / "tiny_kvae_to_hunyuan.safetensors",
}
TINY_15_ADAPTERS = {
    "h2k": ASSETS / "tiny_hunyuan15_to_kvae.safetensors",
    "k2h": ASSETS / "tiny_kvae_to_hunyuan15.safetensors",
}
# by the KVAE, as options name it, and the space of a model's latents
INCLUDED_ADAPTERS = {
    ("tiny", "hunyuan_video"): TINY_ADAPTERS,
    ("tiny-t4s16", "hunyuan_video_1.5"): TINY_15_ADAPTERS,
}


class VideoVAE(Protocol):
    """A VAE as extraction and evaluation need it: it casts, scales and clips pixels itself."""

    space: LatentSpace
    source: str  # as given by the user: a tiny VAE's name, a folder, a file or a hub id
    digest: str  # sha256 of the weights file
    signature: tuple[float, ...]  # of the weights in the file, see kvae.signature

    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [B, 3, T, H, W] → raw float32 latents [B, c, t, h, w]: the posterior's mean, or a sample.

        A sample if a generator is given. T is padded to a whole number of latents with repeats of the last frame.
        """

    def decode(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents [B, c, t, h, w] → float32 pixels [B, 3, T, H, W], clipped to 0..255. T includes padding."""

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights. `signature` stays that of the file."""


class HunyuanVAE:
    """AutoencoderKLHunyuanVideo or AutoencoderKLHunyuanVideo15 of diffusers.

    The latter computes the clips of a batch one after another: its own attention fails for batches.
    """

    def __init__(self, vae: Any, source: str, digest: str):
        self.vae, self.source, self.digest = vae, source, digest
        self.signature = signature(vae.state_dict())
        newer = type(vae).__name__ == "AutoencoderKLHunyuanVideo15"
        self.space = latent_space("hunyuan_video_1.5" if newer else "hunyuan_video")
        if newer:
            vae.enable_slicing()

    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.encode_unit(pad_frames(to_unit(x_B3THW.to(self.vae.device), HUNYUAN_HALF_RANGE)), generator)

    @torch.inference_mode()
    def encode_unit(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels in −1..1, of any float dtype, on any device; T is 4n + 1. Otherwise as `encode`."""
        posterior = self.vae.encode(x_B3THW.to(self.vae.device, self.vae.dtype)).latent_dist
        return (posterior.sample(generator) if generator else posterior.mode()).float()

    @torch.inference_mode()
    def decode(self, z_Bcthw: Tensor) -> Tensor:
        x = self.vae.decode(z_Bcthw.to(self.vae.device, self.vae.dtype)).sample
        return from_unit(x, HUNYUAN_HALF_RANGE)

    def cast(self, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, dtype)  # diffusers' own method warns, and does the same


class KVAE3D:
    """A KVAE-3D of any kind, run by this project."""

    def __init__(self, kvae: KVAE, source: str, digest: str):
        self.kvae, self.source, self.digest = kvae, source, digest
        self.signature = signature(kvae.state_dict())
        self.space = native_space(kvae.config)

    @torch.inference_mode()
    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = x_B3THW.to(next(self.kvae.parameters()).device)  # moved as bytes, a quarter of the floats
        posterior = self.kvae.posterior(to_unit(x, KVAE_HALF_RANGE))
        return (posterior.sample(generator) if generator else posterior.mean).float()

    @torch.inference_mode()
    def decode(self, z_Bcthw: Tensor) -> Tensor:
        return from_unit(self.kvae.decode(z_Bcthw), KVAE_HALF_RANGE)

    def cast(self, dtype: torch.dtype) -> None:
        self.kvae.to(dtype).fold()


def load_hunyuan_vae(
    name: str, device: str, dtype: torch.dtype = torch.float32, temporal_tiles: bool = False
) -> HunyuanVAE:
    """Load the VAE of HunyuanVideo or HunyuanVideo 1.5, frozen. It computes whole clips, however long.

    Args:
        name: a tiny VAE's ("tiny", "tiny-1.5"), a folder, a .safetensors file or a hub id.
        temporal_tiles: run HunyuanVideo's as diffusers does, clips of more than 17 frames in tiles that do not see
            each other, as for the published pairs.

    Raises:
        WeightsError: there are no weights, or they are of another model; the message says which.
    """
    path = weights_file(name, "hunyuan")
    vae = read_hunyuan_vae(path, dtype).to(device)
    if not temporal_tiles:
        see_whole_clips(vae)
    return HunyuanVAE(vae, name, sha256_of(path))


def load_kvae_for_training(name: str, device: str, dtype: torch.dtype = torch.float32) -> KVAE3D:
    """Load a KVAE-3D, frozen. Arguments and errors are those of `load_hunyuan_vae`."""
    path = weights_file(name, "kvae")
    return KVAE3D(load_kvae(path, dtype, device), name, sha256_of(path))


def weights_file(name: str, which: str) -> Path:
    """The weights file of a VAE.

    Args:
        name: a tiny VAE's ("tiny", "tiny-1.5", "tiny-t4s16"), a folder, a .safetensors file or a hub id.
        which: "hunyuan" or "kvae": the kind of VAE.

    Raises:
        WeightsError: there is no such file, or the name is of a tiny VAE of the other kind.
    """
    path = tiny_file(name, which)
    if path is None:
        _check_kind(name, which)
        return find_weights(name)
    if not path.exists():  # .comfyignore leaves out those that no node needs
        raise WeightsError(
            f"{path.name} is not part of the ComfyUI package. It is in this project's repository, in "
            f"training/tiny/assets; copy it to {path.parent}. All commands but demo accept other weights: "
            f"{OPTIONS[which]}"
        )
    return path


def _check_kind(name: str, which: str) -> None:
    other = "kvae" if which == "hunyuan" else "hunyuan"
    if tiny_file(name, other) and not Path(name).exists():
        raise WeightsError(
            f"{OPTIONS[which]} {name}: {name} is a VAE for {OPTIONS[other]}; {OPTIONS[which]} takes "
            f"{' or '.join(tiny_names(which))}, a folder, a .safetensors file or a hub id"
        )


def tiny_names(which: str) -> list[str]:
    """The names of the tiny VAEs of a kind."""
    return [key.replace(which, "tiny", 1) for key in TINY if key.startswith(which)]


def tiny_file(name: str, which: str) -> Path | None:
    """The file of the tiny VAE that an option names, or None. The arguments are those of `weights_file`."""
    return TINY.get(which + name.removeprefix("tiny")) if name.startswith("tiny") else None


def made_with(vae: VideoVAE) -> dict:
    """The entry of a VAE in a manifest: its space, and the sha256 and the signature of its weights."""
    return {"space": vae.space.name, "sha256": vae.digest, "signature": list(vae.signature)}


def check_grids(hunyuan: LatentSpace, kvae: LatentSpace) -> None:
    """Refuse two spaces whose grids no adapter can join.

    Raises:
        UserError: their frames per latent differ, or their sides by no whole factor; the message says which VAEs go
            together.
    """
    if spatial_ratio(hunyuan, kvae):
        return
    fitting = [
        f"{one.name} with {other.name}"
        for one in SPACES.values()
        for other in SPACES.values()
        if one.name.startswith("hunyuan") and other.name.startswith("kvae") and spatial_ratio(one, other)
    ]
    raise UserError(f"{grid_of(hunyuan)}, {grid_of(kvae)}; an adapter needs two VAEs such as {', '.join(fitting)}")
