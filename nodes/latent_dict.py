"""ComfyUI's LATENT, a dict around the samples, and what this pack writes into it beside them.

`kvae_space` names the space of the samples where a node of this pack knows it, and `kvae_frames` the frames of the clip
they were encoded from. Samplers and most latent nodes carry both on.
"""

from __future__ import annotations

from torch import Tensor

from ..adapters.checks import check_values

SPACE, FRAMES = "kvae_space", "kvae_frames"


def samples_of(latent: dict) -> Tensor:
    """The samples; of a nested latent (video with audio) the video part, which comes first.

    Raises:
        ValueError: it is not a LATENT, or its samples are no tensor of floats.
    """
    if not isinstance(latent, dict) or "samples" not in latent:
        raise ValueError(
            f"This is a {type(latent).__name__} without samples; expected a LATENT. Check the node that made it."
        )
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
    check_values(samples)
    return samples


def space_of(latent: dict) -> str | None:
    """The name of the space of the samples, if it is known.

    Raises:
        ValueError: it is no name.
    """
    name = latent.get(SPACE)
    if name is not None and not isinstance(name, str):
        raise ValueError(
            f"{SPACE} of this latent is {repr(name)[:60]}; expected the name of a space. Check what made it."
        )
    return name
