"""ComfyUI's LATENT, a dict with the samples, and the two entries that this pack adds.

`kvae_space` names the space of the samples, if a node of this pack knows it. `kvae_frames` is the number of frames of
the clip that they were encoded from. Samplers and most latent nodes pass both on.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..adapters.checks import check_values

try:
    from comfy.nested_tensor import NestedTensor
except ImportError:  # of a ComfyUI without models that make video and audio together
    NestedTensor = None

SPACE, FRAMES = "kvae_space", "kvae_frames"


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
