"""Write raw latents as files that ComfyUI, musubi-tuner, diffusers and Kandinsky 5's own code read.

| format | key | layout | values |
|---|---|---|---|
| comfyui | `latent_tensor` | [B, c, t, h, w] | raw, in the dtype of the latent |
| musubi | `latent` | [c, t, h, w], of one clip | scaled, float32 |
| diffusers | `latents` | [B, c, t, h, w] | scaled, float32 |
| kandinsky | `latents` | [t, h, w, c], of one clip | scaled, float32 |

All of them say in their metadata what they are, so that `latent_files.load_latent` reads them without being asked.

A latent of several parts, such as video and audio, is a ComfyUI .latent file too: the first part is `latent_tensor`,
which is all that ComfyUI reads, the others are `latent_part_2`, `latent_part_3` …, and the metadata `kvae_parts` count
them. `latent_extras` says where the noise mask is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ..adapters.checks import check_finite, check_latent, check_values
from ..adapters.spaces import LatentSpace
from ..adapters.weights import VAEWeights
from ..kvae.files import save_weights
from .architectures import CACHED, KANDINSKY
from .clips import check_frame_count
from .latent_extras import NONE, Extras
from .latent_files import MAX_PARTS, part_keys

ENDINGS = {"comfyui": ".latent", "musubi": ".safetensors", "diffusers": ".safetensors", "kandinsky": ".safetensors"}


def save_latent(
    path: str | os.PathLike,
    z: Tensor,
    space: str | None,
    frames: int | None,
    metadata: dict[str, str],
    others: Sequence[Tensor] = (),
    extras: Extras = NONE,
    weights: VAEWeights | None = None,
) -> None:
    """Write raw latents as a ComfyUI .latent file that also names their space and the weights of its VAE.

    A failure leaves no partial file.

    Args:
        space: the name of the latents' space, if known.
        frames: the frames of the encoded clip, if known.
        metadata: texts for the file's header.
        others: the parts after z, such as audio. They may hold NaN: the video is worth saving all the same.
        extras: what comes with them, such as a noise mask; see `latent_extras`.
        weights: of the VAE that the latents are of, if known.

    Raises:
        ValueError: a part is not a dense float tensor with values, z is not finite, there are more than MAX_PARTS
            parts, or `frames` is not a positive whole number.
        WeightsError: the file cannot be written.
    """
    for part in (z, *others):
        check_values(part)
    check_finite(z, "latent")
    check_frame_count(frames)
    if 1 + len(others) > MAX_PARTS:
        raise ValueError(f"This latent has {1 + len(others)} parts; expected at most {MAX_PARTS}. Check what made it.")
    ours = _named(space, frames, weights) | {"kvae_parts": str(1 + len(others))}
    # without the second tensor, ComfyUI reads the values in an older scale
    tensors = {"latent_tensor": z, "latent_format_version_0": torch.empty(0)}
    tensors |= dict(zip(part_keys(1 + len(others)), others, strict=True))
    more, texts = extras.to_file()
    save_weights(path, tensors | more, metadata | ours | texts)


def _named(space: str | None, frames: int | None, weights: VAEWeights | None) -> dict[str, str]:
    """What the files of all formats say of their latents."""
    described = json.dumps(asdict(weights)) if weights else ""
    return {"kvae_space": space or "", "kvae_frames": str(frames or ""), "kvae_weights": described}


def check_format(form: str, space: LatentSpace) -> None:
    """Raise unless files of a format, a key of ENDINGS, hold latents of a space.

    Raises:
        ValueError: the program that reads the format has no model of this space.
    """
    if form == "musubi" and space.name not in CACHED:
        theirs = " or ".join(name for name in CACHED if name != KANDINSKY)
        raise ValueError(f"musubi-tuner has no model of {space.name}; expected {theirs}")
    if form == "kandinsky" and space != CACHED[KANDINSKY].space:
        raise ValueError(f"Kandinsky 5 does not read {space.name}; expected {CACHED[KANDINSKY].space.name}")


def save_clip(
    path: str | os.PathLike,
    z_1cthw: Tensor,
    space: LatentSpace,
    frames: int,
    form: str,
    metadata: dict[str, str],
    weights: VAEWeights | None = None,
) -> None:
    """Write the raw latent of one clip, [1, c, t, h, w], in a format, a key of ENDINGS.

    Args:
        frames: the frames of the encoded clip.
        metadata: texts for the file's header.
        weights: of the VAE that the latent is of, if known.

    Raises:
        ValueError: the format does not hold latents of this space, or as `save_latent`.
        WeightsError: the file cannot be written.
    """
    check_format(form, space)
    check_latent(z_1cthw, space)
    check_frame_count(frames)
    if form == "comfyui":
        save_latent(path, z_1cthw, space.name, frames, metadata, weights=weights)
        return
    _, _, decoded, height, width = space.decoded_shape(z_1cthw.shape)
    z, ours = space.scale(z_1cthw.float()), _named(space.name, frames, weights)
    if form == "musubi":
        tensors = {"latent": z[0]}
        ours |= {"height": str(height), "width": str(width), "video_length": str(decoded)}
    else:
        tensors = {"latents": z if form == "diffusers" else z[0].movedim(0, -1)}
    model = CACHED.get(KANDINSKY if form == "kandinsky" else space.name)
    save_weights(path, tensors, metadata | ours | ({"architecture": model.name} if model else {}))
