"""Resize pictures: stretched, or cropped to the new proportions first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .display import Picture

CROP, STRETCH = "crop", "stretch"
SLACK = 0.01  # of the proportions: a crop by one pixel would blur all others, and nobody sees so small a stretch


def fit_picture(picture: Picture, height: int, width: int, fit: str = CROP) -> Tensor:
    """Picture → uint8 [3, height, width].

    Args:
        fit: CROP keeps the largest centred part with these proportions, as seen on a screen; STRETCH keeps everything.
    """
    rgb = picture.rgb
    rows, columns = rgb.shape[:2]
    wide = height * columns * picture.pixel_aspect / (width * rows)  # above 1: wider than asked for
    if fit == CROP and abs(wide - 1) > SLACK:
        cut_rows, cut_columns = max(1, round(min(1, wide) * rows)), max(1, round(columns / max(1, wide)))
        top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
        rgb = rgb[top : top + cut_rows, left : left + cut_columns]
    return resize(torch.from_numpy(rgb).permute(2, 0, 1), height, width)


def resize(frame_3HW: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] → uint8 [3, height, width], bilinear with antialiasing."""
    if frame_3HW.shape[1:] == (height, width):
        return frame_3HW.contiguous()
    frame = F.interpolate(frame_3HW[None].float(), (height, width), mode="bilinear", antialias=True)
    return frame[0].round().clamp(0, 255).byte()
