"""The models whose latents musubi-tuner caches, and what it calls them.

The names are those of its dataset/architectures.py; which caches hold scaled latents, each of its caching scripts says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..adapters.spaces import SPACES, LatentSpace

KANDINSKY = "kandinsky5"  # HunyuanVideo's space, but with the channels last outside of musubi-tuner's caches
MODELS = (*SPACES, KANDINSKY)  # models that a user may name for a file
LATENTS_KEY = re.compile(r"latents_(\d{1,9})x(\d{1,9})x(\d{1,9})_(\w+)")  # latent frames, rows, columns, dtype


@dataclass(frozen=True)
class Architecture:
    """A model in musubi-tuner's caches.

    Attributes:
        name: `architecture` in a cache's metadata.
        short: the end of a cache's file name.
        space: the space of the latents.
        scaled: whether the cache holds scaled latents, not raw ones.
        model: the name in options, one of `MODELS`; empty for a model whose caches are refused.
        ends: whether caches hold the first and the last latent once more.
        first_frame: whether caches may hold the first frame, to train image to video.
    """

    name: str
    short: str
    space: LatentSpace
    scaled: bool
    model: str
    ends: bool = False
    first_frame: bool = False


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("hunyuan_video", "hv", SPACES["hunyuan_video"], False, "hunyuan_video"),
        Architecture(
            "hunyuan_video_1_5", "hv15", SPACES["hunyuan_video_1.5"], False, "hunyuan_video_1.5", first_frame=True
        ),
        Architecture("kandinsky5", "k5", SPACES["hunyuan_video"], True, KANDINSKY, ends=True),
        Architecture("framepack", "fp", SPACES["hunyuan_video"], True, ""),  # sections of clips, without their first
    )
}
CACHED = {each.model: each for each in ARCHITECTURES.values() if each.model}  # those that are written here, too
