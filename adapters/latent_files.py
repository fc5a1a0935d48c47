"""Latent files of others, as raw latents [B, c, t, h, w] in float32, and our own, which ComfyUI reads too.

| file | known by | values |
|---|---|---|
| ComfyUI .latent | `latent_tensor` | raw |
| musubi-tuner, latent output | `latent` | scaled |
| musubi-tuner, latent cache | `latents_{t}x{h}x{w}_{dtype}` | raw for HunyuanVideo, scaled for Kandinsky 5 |
| diffusers, output_type="latent" | the only tensor | scaled |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kvae.files import Weights, WeightsError, save_weights
from .inspect import fitting_spaces
from .spaces import SPACES

_CHANNELS = {space.channels for space in SPACES.values()}
_OLD_COMFYUI_SCALE = 0.18215  # ComfyUI files of before `latent_format_version_0` hold Stable Diffusion's scaled latents


@dataclass(frozen=True)
class LatentFile:
    """A latent and what its file says: `kind` of file, name of the `space` and number of `frames` where it knows."""

    z: Tensor
    kind: str
    space: str | None = None
    frames: int | None = None


def save_latent(
    path: str | os.PathLike, z: Tensor, space: str | None, frames: int | None, metadata: dict[str, str]
) -> None:
    """Write a ComfyUI .latent file of raw latents that also names its space. Whole or not at all."""
    ours = {"kvae_space": space or "", "kvae_frames": str(frames or "")}
    # ComfyUI takes a file without the second tensor for one of an older scale
    save_weights(path, {"latent_tensor": z, "latent_format_version_0": torch.empty(0)}, metadata | ours)


def load_latent(path: str | os.PathLike, scaled: bool | None = None) -> LatentFile:
    """Read a latent file of any of the kinds above.

    Args:
        scaled: whether its values are a sampler's rather than raw; None: as is usual for its kind.

    Raises:
        WeightsError: not a latent file, a pickle, damaged, or a cache of an unknown model whose scale is not given.
    """
    weights = Weights(path)
    keys = [key for key in weights.shapes if key != "latent_format_version_0"]
    usual: bool | None  # whether files of this kind are scaled
    caches = [key for key in keys if re.fullmatch(r"latents_\d+x\d+x\d+_\w+", key)]
    if "latent_tensor" in keys:
        z, kind, usual = weights["latent_tensor"].float(), "ComfyUI latent", False
        if "latent_format_version_0" not in weights.shapes:
            z = z / _OLD_COMFYUI_SCALE
    elif "latent" in keys:
        z, kind, usual = weights["latent"].float(), "musubi-tuner latent", True
    elif caches:
        architecture = weights.metadata.get("architecture", "")
        z, kind = weights[caches[0]].float(), f"musubi-tuner cache of {architecture or 'an unnamed model'}"
        usual = _scaled_cache(architecture)
        if usual is None and scaled is None:
            raise WeightsError(f"{path}: this is a {kind}; say whether it is raw or scaled")
    elif len(keys) == 1 and len(weights.shapes[keys[0]]) in (4, 5):
        z, kind, usual = weights[keys[0]].float(), f"single tensor {keys[0]}", True
    else:
        raise WeightsError(
            f"{path}: holds {len(keys)} tensors, {', '.join(sorted(keys)[:3])} …; expected a latent: a ComfyUI "
            ".latent, a musubi-tuner latent or cache, or one tensor alone"
        )
    z = _batched(z)
    if usual if scaled is None else scaled:
        z = fitting_spaces(z.shape)[0].unscale(z) if fitting_spaces(z.shape) else z
    frames = weights.metadata.get("kvae_frames")
    return LatentFile(z, kind, weights.metadata.get("kvae_space") or None, int(frames) if frames else None)


def _scaled_cache(architecture: str) -> bool | None:
    if architecture.startswith("kandinsky"):
        return True
    return False if architecture.startswith("hunyuan_video") else None


def _batched(z: Tensor) -> Tensor:
    """[c, t, h, w], or [t, h, w, c] as Kandinsky 5's own code has it, → [1, c, t, h, w]; a batch stays as it is."""
    if z.ndim != 4:
        return z
    if z.shape[0] not in _CHANNELS and z.shape[-1] in _CHANNELS:
        z = z.movedim(-1, 0)
    return z[None] if z.shape[0] in _CHANNELS else z
