"""Latent files of others, as raw latents [B, c, t, h, w] in float32, and our own, which ComfyUI reads too.

| file | known by | layout | values |
|---|---|---|---|
| ComfyUI .latent | `latent_tensor` | as it is | raw |
| musubi-tuner, latent output | `latent` | [c, t, h, w], also with a batch | scaled |
| musubi-tuner, latent cache | `latents_{t}x{h}x{w}_{dtype}`, `architecture` | [c, t, h, w] | see ARCHITECTURES |
| diffusers, output_type="latent" | the only tensor | [B, c, t, h, w]; of Kandinsky 5 [B, t, h, w, c] | scaled |
| Kandinsky 5's own code | the only tensor | [t, h, w, c] | scaled |

What the metadata says comes first, then the key, then the shape. Where two readings are left, the reader asks.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.checks import check_finite, check_values
from ..adapters.spaces import SPACES, LatentSpace, fitting_spaces
from ..kvae.files import Weights, WeightsError, save_weights
from .clips import check_frame_count

# models by the name that musubi-tuner's caches give them: the space of their latents, and whether they are scaled
ARCHITECTURES = {
    "hunyuan_video": ("hunyuan_video", False),
    "hunyuan_video_1_5": ("hunyuan_video_1.5", False),
    "framepack": ("hunyuan_video", True),
    "kandinsky5": ("hunyuan_video", True),
}
KANDINSKY = "kandinsky5"  # HunyuanVideo's space, but diffusers has its channels last
MODELS = (*SPACES, KANDINSKY)  # what a user may say a file is of

_USUALLY_SCALED = {"hunyuan_video": False, "hunyuan_video_1.5": False, KANDINSKY: True}  # in musubi-tuner's caches
_CHANNELS = {space.channels for space in SPACES.values()}
_IMAGE_CHANNELS = {4, 16}  # of image latents: Stable Diffusion's; those of Flux and its like
_OLD_COMFYUI_SCALE = 0.18215  # ComfyUI files of before `latent_format_version_0` hold Stable Diffusion's scaled latents
_COUNT = re.compile(r"[1-9]\d{0,8}")


@dataclass(frozen=True)
class LatentFile:
    """A latent and what its file says: `kind` of file, name of the `space` and number of `frames` where it knows."""

    z: Tensor
    kind: str
    space: str | None = None
    frames: int | None = None


@dataclass(frozen=True)
class _Kind:
    """What a file is: the tensor to read, and what its metadata and its key say of it."""

    name: str
    key: str
    scaled: bool | None  # None: such files are of either sort
    space: str | None = None
    own_batch: bool = False  # the tensor is as it should be
    either_layout: bool = False  # channels may be first or last


def save_latent(
    path: str | os.PathLike, z: Tensor, space: str | None, frames: int | None, metadata: dict[str, str]
) -> None:
    """Write a ComfyUI .latent file of raw latents that also names its space. Whole or not at all.

    Raises:
        ValueError: no latent, values that are not finite, or no number of frames.
        WeightsError: it cannot be written there.
    """
    check_values(z)
    check_finite(z, "latent")
    check_frame_count(frames)
    ours = {"kvae_space": space or "", "kvae_frames": str(frames or "")}
    # ComfyUI takes a file without the second tensor for one of an older scale
    save_weights(path, {"latent_tensor": z, "latent_format_version_0": torch.empty(0)}, metadata | ours)


def load_latent(path: str | os.PathLike, scaled: bool | None = None, model: str | None = None) -> LatentFile:
    """Read a latent file of any of the kinds above.

    Args:
        scaled: whether its values are a sampler's rather than raw; None: as is usual for its kind.
        model: what it is of, one of `MODELS`; None: as the file says, or its shape tells.

    Raises:
        WeightsError: not a latent file, a pickle, damaged, of a model that is not known here, or one that can be read
            in two ways; the message says what to give.
    """
    if model not in (None, *MODELS):
        raise WeightsError(f"{path}: no model is called {model!r}; the known ones are {', '.join(MODELS)}")
    weights = Weights(path)
    kind = _kind(weights, model)
    z = _values(weights, kind)
    if not kind.own_batch:
        z = _batched(weights, kind, z, model)
    found = _space(weights, kind, z, model)
    scaled = kind.scaled if scaled is None else scaled
    if scaled is None:
        raise WeightsError(f"{path}: this is a {kind.name}; say whether it is raw or scaled (scaling)")
    if scaled and fitting_spaces(z.shape):
        z = (SPACES[found] if found else _scaling_space(z)).unscale(z)
    return LatentFile(z, kind.name, found, _frames(weights))


def _kind(weights: Weights, model: str | None) -> _Kind:
    """What the metadata and the keys say that the file is.

    Raises:
        WeightsError: no latent file, or one of a model that is not known here.
    """
    keys = [key for key in weights.shapes if key != "latent_format_version_0"]
    caches = [key for key in keys if re.fullmatch(r"latents_\d+x\d+x\d+_\w+", key)]
    if "latent_tensor" in keys:
        return _Kind("ComfyUI latent", "latent_tensor", False, weights.metadata.get("kvae_space"), own_batch=True)
    if "latent" in keys:
        return _Kind("musubi-tuner latent", "latent", True)
    if len(caches) == 1:
        return _cache(weights, caches[0], model)
    if len(keys) == 1 and len(weights.shapes[keys[0]]) in (4, 5):
        return _Kind(f"single tensor {keys[0]}", keys[0], True, either_layout=True)
    raise WeightsError(
        f"{weights.path}: holds {len(keys)} tensors, {', '.join(sorted(keys)[:3])} …; expected a latent: a ComfyUI "
        ".latent, a musubi-tuner latent or cache, or one tensor alone"
    )


def _cache(weights: Weights, key: str, model: str | None) -> _Kind:
    architecture = weights.metadata.get("architecture", "")
    name = f"musubi-tuner cache of {architecture or 'an unnamed model'}"
    if architecture and architecture not in ARCHITECTURES:
        raise WeightsError(
            f"{weights.path}: this is a {name[:90]}, whose latents are of another VAE; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if architecture:
        space, scaled = ARCHITECTURES[architecture]
        return _Kind(name, key, scaled, space)
    return _Kind(name, key, _USUALLY_SCALED.get(model or ""))


def _values(weights: Weights, kind: _Kind) -> Tensor:
    """The tensor, raw or scaled, in float32.

    Raises:
        WeightsError: it is empty, no floats, or not finite.
    """
    z = weights[kind.key]
    try:
        if not z.is_floating_point():
            check_values(z)  # which refuses it
        if 0 in z.shape:
            raise ValueError(f"This latent is empty, {list(z.shape)}.")
        z = z.float()
        check_finite(z, "latent")
    except ValueError as error:
        raise WeightsError(f"{weights.path}: {kind.key}: {error}") from None
    old = kind.key == "latent_tensor" and "latent_format_version_0" not in weights.shapes
    return z / _OLD_COMFYUI_SCALE if old else z


def _batched(weights: Weights, kind: _Kind, z: Tensor, model: str | None) -> Tensor:
    """[c, t, h, w] or [t, h, w, c] → [1, c, t, h, w], and the same with a batch; an image latent stays as it is.

    Raises:
        WeightsError: two readings fit, and neither file nor user says which is right.
    """
    first = z.shape[-4] in _CHANNELS
    last = z.shape[-1] == SPACES["hunyuan_video"].channels  # of Kandinsky 5 alone
    image = kind.either_layout and z.ndim == 4 and z.shape[1] in _IMAGE_CHANNELS
    if model is not None:
        theirs = model == KANDINSKY and kind.either_layout
        first, last, image = not theirs, theirs and last, False
    elif not kind.either_layout and first:
        last = False  # musubi-tuner's are channels first
    if first + last + image > 1:
        readings = {"[c, t, h, w]": first, "[t, h, w, c]": last, "an image latent": image}
        raise WeightsError(
            f"{weights.path}: {kind.key} is {list(z.shape)}, which can be "
            f"{' or '.join(name for name, fits in readings.items() if fits)}; say what it is of (model): {KANDINSKY} "
            "has its channels last, all others have them first"
        )
    if last:
        z = z.movedim(-1, -4)
    return z[None] if z.ndim == 4 and (first or last) else z


def _space(weights: Weights, kind: _Kind, z: Tensor, model: str | None) -> str | None:
    """The name of the space, where the file or the user says it.

    Raises:
        WeightsError: they do not agree, or the latent has not its shape.
    """
    said = {"the file": kind.space or None}
    said["model"] = "hunyuan_video" if model == KANDINSKY else model
    names = {name for name in said.values() if name}
    if len(names) > 1:
        raise WeightsError(f"{weights.path}: the file says it is of {kind.space}, you say {model}; leave model at auto")
    for name in names:
        if name not in SPACES:
            raise WeightsError(
                f"{weights.path}: names the space {name[:60]!r}; known are {', '.join(SPACES)}: update this pack"
            )
        if SPACES[name] not in fitting_spaces(z.shape):
            raise WeightsError(
                f"{weights.path}: {kind.key} is {list(weights.shapes[kind.key])}; a latent of {name} has "
                f"{SPACES[name].channels} channels"
            )
        return name
    return None


def _scaling_space(z: Tensor) -> LatentSpace:
    """The one space of this shape whose samplers scale; the first, if none does."""
    spaces = fitting_spaces(z.shape)
    return next((space for space in spaces if space.scaling_factor), spaces[0])


def _frames(weights: Weights) -> int | None:
    text = weights.metadata.get("kvae_frames") or None
    if text is None:
        return None
    if not _COUNT.fullmatch(text):
        raise WeightsError(f"{weights.path}: kvae_frames is {text[:60]!r}; expected a number of frames")
    return int(text)
