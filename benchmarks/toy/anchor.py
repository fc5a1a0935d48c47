"""An appearance loss: the subject of the first frame, moved as the teacher moves it, pixel by pixel.

# y_B3THW clips in 0..1; first_B3HW first frames; m_BHW masks of the subject in them
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.toy.world import FRAMES, SIDE, Sprites
from kvae_comfyui.training.vfl.identity import Backbone, resized

STRENGTH = 5.0  # by which the squared error is multiplied, to be about as large as the identity loss
APART = 0.2  # distance of a colour from the border's, of all three channels together
MARGIN = 1  # pixels around the sprite in a box that a user draws


def border_mask(first_B3HW: Tensor) -> Tensor:
    """True where a pixel's colour is not that of most pixels at the border."""
    edge = torch.cat([first_B3HW[..., [0, -1], :].flatten(2), first_B3HW[..., [0, -1]].flatten(2)], 2)
    return (first_B3HW - edge.median(2).values[..., None, None]).norm(dim=1) > APART


@torch.no_grad()
def feature_mask(first_B3HW: Tensor, backbone: Backbone) -> Tensor:
    """True where DINOv3's states of a patch are farther from most of the border's than half of the farthest are."""
    patch = backbone.model.config.patch_size
    p = (resized(first_B3HW, backbone.side) - backbone.get_buffer("mean")) / backbone.get_buffer("std")
    found = backbone.model(p).last_hidden_state[:, 1 + backbone.model.config.num_register_tokens :]
    cells = backbone.side // patch
    x = found.unflatten(1, (cells, cells)).movedim(3, 1)
    edge = torch.cat([x[..., [0, -1], :].flatten(2), x[..., [0, -1]].flatten(2)], 2).median(2).values
    away = (x - edge[..., None, None]).norm(dim=1)
    mask = away > away.amax((1, 2), keepdim=True) / 2
    return mask.repeat_interleave(SIDE // cells, 1).repeat_interleave(SIDE // cells, 2)


def box_mask(true_BHW: Tensor) -> Tensor:
    """A box around the sprite with some margin, as drawn by hand."""
    grown = torch.nn.functional.max_pool2d(true_BHW.float()[:, None], 2 * MARGIN + 1, 1, MARGIN)
    return grown[:, 0] > 0


def mask_of(kind: str, shown: Sprites, backbone: Backbone) -> Tensor:
    """m_BHW: "true", "border", "features", "box", or "all" for the whole picture."""
    first, true = shown.clips()[:, :, 0], shown.masks()[:, 0]
    makers: dict[str, Callable[[], Tensor]] = {
        "true": lambda: true,
        "border": lambda: border_mask(first),
        "features": lambda: feature_mask(first, backbone),
        "box": lambda: box_mask(true),
        "all": lambda: torch.ones_like(true),
    }
    return makers[kind]()


@torch.no_grad()
def moved(y_B3THW: Tensor, first_B3HW: Tensor, m_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """The subject of the first frame, moved in each frame by whole pixels to where the clip looks most like it.

    Args:
        y_B3THW: the teacher's clip.

    Returns:
        its picture and its mask in each frame, [B, 3, T, H, W] and [B, T, H, W].
    """
    best = torch.full((len(y_B3THW), FRAMES), torch.inf)
    pictures, masks = torch.zeros_like(y_B3THW), torch.zeros(len(y_B3THW), FRAMES, SIDE, SIDE, dtype=torch.bool)
    reach = range(-SIDE + 1, SIDE)
    for down in reach:
        for right in reach:
            mask, picture = shifted(m_BHW[:, None], down, right)[:, 0], shifted(first_B3HW, down, right)
            seen = mask.sum((1, 2))
            error = (y_B3THW - picture[:, :, None]).square().sum(1) * mask[:, None]
            error = error.sum((2, 3)) / seen[:, None].clamp_min(1)
            better = (error < best) & (seen == m_BHW.sum((1, 2)))[:, None]  # what leaves the picture is not followed
            best = torch.where(better, error, best)
            pictures = torch.where(better[:, None, :, None, None], picture[:, :, None], pictures)
            masks = torch.where(better[..., None, None], mask[:, None], masks)
    return pictures, masks


def shifted(x_BCHW: Tensor, down: int, right: int) -> Tensor:
    """Pixels moved down and to the right; zeros come in."""
    x = torch.zeros_like(x_BCHW)
    height, width = x.shape[2:]
    x[:, :, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = x_BCHW[
        :, :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
    ]
    return x


def anchor_loss(y_B3THW: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared error on the moved subject after the first frame, times STRENGTH."""
    picture, mask = target
    error = (y_B3THW - picture).square().mean(1)[:, 1:]
    weight = mask[:, 1:].float()
    return STRENGTH * (error * weight).sum() / weight.sum().clamp_min(1)
