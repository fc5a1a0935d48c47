"""ComfyUI's LATENT, a dict around the samples, and what this pack writes into it beside them.

`kvae_space` names the space of the samples where a node of this pack knows it, and `kvae_frames` the frames of the clip
they were encoded from. Samplers and most latent nodes carry both on.
"""

from __future__ import annotations

from torch import Tensor

SPACE, FRAMES = "kvae_space", "kvae_frames"


def samples_of(latent: dict) -> Tensor:
    """The samples; of a nested latent (video with audio) the video part, which comes first."""
    samples = latent["samples"]
    return samples.unbind()[0] if getattr(samples, "is_nested", False) else samples


def space_of(latent: dict) -> str | None:
    """The name of the space of the samples, if it is known."""
    return latent.get(SPACE)
