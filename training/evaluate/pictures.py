"""Pictures of videos side by side.

# videos are uint8 [3, T, H, W], RGB
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...kvae.paths import written_whole

LABEL_HEIGHT = 18  # pixels
FRAMES = 3  # of each clip on a sheet


def contact_sheet(path: Path, labels: list[str], clips: list[list[Tensor]], frames: int = FRAMES) -> None:
    """Write a PNG with a column for each label and, for each clip, rows of its first, middle and last frame.

    Args:
        clips: for each clip, a video for each label, of one size.
        frames: rows of each clip, evenly spread over its frames.

    Raises:
        WeightsError: the file cannot be written.
    """
    height, width = (max(videos[0].shape[axis] for videos in clips) for axis in (2, 3))
    rows = frames * len(clips)
    sheet = Image.new("RGB", (width * len(labels), LABEL_HEIGHT + height * rows), "white")
    for row in range(rows):
        videos = clips[row // frames]
        t = (row % frames) * (videos[0].shape[1] - 1) // max(1, frames - 1)
        for column, video in enumerate(videos):
            image = Image.fromarray(rearrange(video[:, t], "c h w -> h w c").contiguous().numpy())
            sheet.paste(image, (column * width, LABEL_HEIGHT + row * height))
    _write_labels(sheet, labels, width)
    with written_whole(path) as partial:
        sheet.save(partial, "PNG")


def side_by_side(labels: list[str], videos: list[Tensor]) -> Tensor:
    """Join videos, uint8 [3, T, H, W], into one with labels, [3, T, H + label, n·W]; sides are even, as H.264 needs."""
    height, width = videos[0].shape[2:]
    label = Image.new("RGB", (width * len(videos), LABEL_HEIGHT + height % 2), "white")
    _write_labels(label, labels, width)
    strip = torch.frombuffer(bytearray(label.tobytes()), dtype=torch.uint8)
    strip = rearrange(strip, "(h w c) -> c 1 h w", h=label.height, c=3)
    body = torch.cat(videos, dim=3)
    body = torch.cat([strip.expand(-1, body.shape[1], -1, -1), body], dim=2)
    return torch.nn.functional.pad(body, (0, body.shape[3] % 2))


def _write_labels(image: Image.Image, labels: list[str], width: int) -> None:
    draw = ImageDraw.Draw(image)
    # matplotlib ships this font; Pillow's own has no arrows
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
    for column, text in enumerate(labels):
        draw.text((column * width + 4, 2), text, fill="black", font=font)
