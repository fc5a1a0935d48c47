"""Pictures brought to a size: stretched, or cut to its proportions first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shown import Picture

CROP, STRETCH = "crop", "stretch"
SLACK = 0.01  # of the proportions: cutting off a pixel would cost the sharpness of all others, and nobody sees it


def fitted(picture: Picture, height: int, width: int, fit: str = CROP) -> Tensor:
    """uint8 [3, height, width]: the largest part of the picture of those proportions, around its middle, as it looks on
    a screen; or all of it, stretched.
    """
    rgb = picture.rgb
    rows, columns = rgb.shape[:2]
    wide = height * columns * picture.pixel_aspect / (width * rows)  # beside what is asked for
    if fit == CROP and abs(wide - 1) > SLACK:
        cut_rows, cut_columns = max(1, round(min(1, wide) * rows)), max(1, round(columns / max(1, wide)))
        top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
        rgb = rgb[top : top + cut_rows, left : left + cut_columns]
    return resized(torch.from_numpy(rgb).permute(2, 0, 1), height, width)


def resized(frame_3HW: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] → uint8 [3, height, width], bilinear with antialiasing."""
    if frame_3HW.shape[1:] == (height, width):
        return frame_3HW.contiguous()
    frame = F.interpolate(frame_3HW[None].float(), (height, width), mode="bilinear", antialias=True)
    return frame[0].round().clamp(0, 255).byte()
