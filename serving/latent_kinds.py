"""The kind of a latent file: which tensor to read, and what the metadata and the key say of it.

A cache of another model is refused by name, whatever the user says of it: its latents are of another VAE. A cache of
FramePack is refused, too, although its VAE is HunyuanVideo's. It holds a section of a clip without the clip's first
latent, which is one frame where all others are four, and a causal decoder cannot start without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..kvae.errors import WeightsError
from ..kvae.files import Weights
from .architectures import ARCHITECTURES, CACHED, KANDINSKY, LATENTS_KEY, Architecture

COUNT = re.compile(r"[1-9]\d{0,8}")  # a number of frames in metadata


@dataclass(frozen=True)
class Kind:
    """The kind of a file: the tensor to read, and what metadata and key say of it."""

    name: str
    key: str
    scaled: bool | None  # None: such files may be scaled or raw
    model: str | None = None  # one of MODELS, or the name of an unknown space
    batched: bool = False  # the tensor has its batch axis, and channels come second
    either_layout: bool = False  # channels may be first or last


def kind_of(weights: Weights, model: str | None) -> Kind:
    """The kind of the file, by its metadata and keys.

    Raises:
        WeightsError: not a latent file, or one of another model.
    """
    keys = [key for key in weights.shapes if key != "latent_format_version_0"]
    caches = [key for key in keys if LATENTS_KEY.fullmatch(key)]
    space = weights.metadata.get("kvae_space") or None
    if "latent_tensor" in keys:
        return Kind("ComfyUI latent", "latent_tensor", False, space, batched=True)
    found = _architecture(weights)
    named = found.model if found and (found.model == KANDINSKY or not space) else space
    if "latent" in keys:
        _check_not_wan(weights, named or model)
        return Kind("musubi-tuner latent", "latent", True, named)
    if len(caches) == 1:
        name = f"musubi-tuner cache of {found.name if found else 'an unnamed model'}"
        told = found or CACHED.get(model or "")
        return Kind(name, caches[0], told.scaled if told else None, named)
    if len(keys) == 1 and len(weights.shapes[keys[0]]) in (4, 5):
        return Kind(f"single tensor {keys[0]}", keys[0], True, named, either_layout=True)
    raise WeightsError(
        f"{weights.path}: its tensors are {', '.join(sorted(keys)[:3]) or 'none'} …; expected a latent: a ComfyUI "
        ".latent, a musubi-tuner latent or cache, or a file with one tensor of 4 or 5 dimensions"
    )


def _architecture(weights: Weights) -> Architecture | None:
    """The model that musubi-tuner's metadata name.

    Raises:
        WeightsError: its latents cannot be read, whatever the user says of them.
    """
    name = weights.metadata.get("architecture")
    if not name:
        return None
    found, what = ARCHITECTURES.get(name), f"{weights.path}: this is a musubi-tuner cache of {name[:60]}"
    if not found:
        expected = ", ".join(each.name for each in CACHED.values())
        raise WeightsError(f"{what}, whose latents are from another VAE; expected one of {expected}")
    if not found.model:
        raise WeightsError(
            f"{what}, which holds a section of a clip without the clip's first latent; no decoder can start there. "
            f"Cache the clip for {found.space.name} instead"
        )
    return found


def _check_not_wan(weights: Weights, model: str | None) -> None:
    """Raise for an output that may be of Wan 2.1, whose latents have HunyuanVideo's shape, if nobody names its model.

    musubi-tuner's hv_generate_video.py writes `embedded_cfg_scale` into its metadata, wan_generate_video.py does not.

    Raises:
        WeightsError: it may be.
    """
    wan = "infer_steps" in weights.metadata and "embedded_cfg_scale" not in weights.metadata
    if wan and not model and weights.shapes["latent"][-4:-3] == (16,):
        raise WeightsError(
            f"{weights.path}: this musubi-tuner latent says nothing of embedded_cfg_scale, so it may be of Wan 2.1, "
            "whose VAE is another one; if it is of HunyuanVideo, set model"
        )
