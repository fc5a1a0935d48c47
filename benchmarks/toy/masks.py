"""Masks of the subject in a first frame, that the appearance loss may be given.

# p_B3HW first frames in 0..1; m_BHW 1 on the subject, 0 elsewhere
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.toy.world import Sprites
from kvae_comfyui.training.vfl.identity import Backbone
from kvae_comfyui.training.vfl.subjects import feature_mask

APART = 0.2  # distance of a colour from the border's, of all three channels together
MARGIN = 1  # pixels around the sprite in a box that a user draws


def mask_of(kind: str, shown: Sprites, backbone: Backbone) -> Tensor:
    """m_BHW: "true", "border", "features", "box", or "all" for the whole picture."""
    first, true = shown.clips()[:, :, 0], shown.masks()[:, 0].float()
    makers: dict[str, Callable[[], Tensor]] = {
        "true": lambda: true,
        "border": lambda: border_mask(first),
        "features": lambda: feature_mask(backbone, first),
        "box": lambda: box_mask(true),
        "all": lambda: torch.ones_like(true),
    }
    return makers[kind]()


def border_mask(p_B3HW: Tensor) -> Tensor:
    """Where a pixel's colour is not that of most pixels at the border."""
    edge = torch.cat([p_B3HW[..., [0, -1], :].flatten(2), p_B3HW[..., [0, -1]].flatten(2)], 2)
    return ((p_B3HW - edge.median(2).values[..., None, None]).norm(dim=1) > APART).float()


def box_mask(true_BHW: Tensor) -> Tensor:
    """A box around the sprite with some margin, as drawn by hand."""
    return torch.nn.functional.max_pool2d(true_BHW[:, None], 2 * MARGIN + 1, 1, MARGIN)[:, 0]
