"""ComfyUI's LATENT, a dict with the samples, and the three entries that this pack adds.

`kvae_space` names the space of the samples, if a node of this pack knows it. `kvae_frames` is the number of frames of
the clip that they were encoded from. `kvae_weights` names the weights of the VAE that the samples are of.

Samplers and most latent nodes pass all entries on. A sampler's result is in the space of what it started from, but of
the VAE that its model was trained with, which need not be the VAE that made the start: a full denoise keeps nothing of
it. `kvae_weights` therefore holds a few of the values that it speaks of, and says nothing of other samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.checks import check_values
from ..adapters.weights import VAEWeights
from ..kvae.foreign import build
from ..kvae.signature import same_weights

try:
    from comfy.nested_tensor import NestedTensor
except ImportError:  # of a ComfyUI without models that make video and audio together
    NestedTensor = None

SPACE, FRAMES, WEIGHTS = "kvae_space", "kvae_frames", "kvae_weights"
VALUES = 64  # how many of the samples' values `kvae_weights` holds


@dataclass(frozen=True)
class Entry:
    """`kvae_weights`: the fields of VAEWeights, and values of the samples, evenly spaced."""

    sha256: str
    signature: tuple[float, ...]
    values: tuple[float, ...]


def described(
    parts: Sequence[Tensor], space: str | None, frames: int | None, weights: VAEWeights | None
) -> dict[str, Any]:
    """A LATENT with these parts, and with the entries that are known."""
    entry = Entry(**asdict(weights), values=_values(parts[0])) if weights else None
    latent = {SPACE: space, FRAMES: frames, WEIGHTS: entry and asdict(entry)}
    return {"samples": joined(parts)} | {key: value for key, value in latent.items() if value is not None}


def parts_of(latent: dict) -> list[Tensor]:
    """The samples of a LATENT; of a nested latent (video with audio) each part, the video first.

    Raises:
        ValueError: not a LATENT, or its first part is not a dense float tensor with values.
    """
    if not isinstance(latent, dict) or "samples" not in latent:
        raise ValueError(f"This is a {type(latent).__name__} without samples; expected a LATENT. Check what made it.")
    samples = latent["samples"]
    parts = list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]
    if not parts:
        raise ValueError("This latent is nested, but has no part; expected video, or video and audio.")
    check_values(parts[0])
    return parts


def samples_of(latent: dict) -> Tensor:
    """The samples of a LATENT; of a nested latent (video with audio) the video part, which comes first.

    Raises:
        ValueError: as `parts_of`.
    """
    return parts_of(latent)[0]


def joined(parts: Sequence[Tensor]) -> Tensor | NestedTensor:
    """The samples of a LATENT with these parts; the first part alone where ComfyUI has no nested latents."""
    return NestedTensor(parts) if len(parts) > 1 and NestedTensor else parts[0]


def space_of(latent: dict) -> str | None:
    """The name of the space of the samples, if known.

    Raises:
        ValueError: the entry is not text.
    """
    name = latent.get(SPACE)
    if name is not None and not isinstance(name, str):
        raise ValueError(
            f"{SPACE} of this latent is {repr(name)[:60]}; expected the name of a space. Check the node that made it."
        )
    return name


def weights_of(latent: dict) -> VAEWeights | None:
    """The weights of the VAE that the samples are of; None if they are unknown, or the samples have changed.

    Raises:
        ValueError: the entry is not what this pack writes, or as `parts_of`.
    """
    if latent.get(WEIGHTS) is None:
        return None
    try:
        entry = build(Entry, latent[WEIGHTS])
    except ValueError as error:
        raise ValueError(f"{WEIGHTS} of this latent is damaged ({error}). Check the node that made it.") from None
    same = same_weights(entry.values, _values(samples_of(latent)))
    return VAEWeights(entry.sha256, entry.signature) if same and entry.values else None


def _values(z: Tensor) -> tuple[float, ...]:
    places = torch.arange(VALUES, device=z.device) * z.numel() // VALUES
    return tuple(z.detach().reshape(-1)[places].float().tolist()) if z.numel() else ()
