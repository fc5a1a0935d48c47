"""ComfyUI's LATENT, a dict with the samples, and the two entries that this pack adds.

`kvae_space` names the space of the samples, if a node of this pack knows it. `kvae_frames` is the number of frames of
the clip that they were encoded from. Samplers and most latent nodes pass both on.
"""

from __future__ import annotations

from torch import Tensor

from ..adapters.checks import check_values

SPACE, FRAMES = "kvae_space", "kvae_frames"


def samples_of(latent: dict) -> Tensor:
    """The samples of a LATENT; of a nested latent (video with audio) the video part, which comes first.

    Raises:
        ValueError: not a LATENT, or its samples are not a dense float tensor with values.
    """
    if not isinstance(latent, dict) or "samples" not in latent:
        raise ValueError(f"This is a {type(latent).__name__} without samples; expected a LATENT. Check what made it.")
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
    check_values(samples)
    return samples


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
