"""Sprites of two colours that cross a picture: what a clip of them is, as pixels, as latents and as conditions.

A sprite is 4x4 pixels, of one colour above and of another below. It crosses a dark picture of 12x12 pixels in 4 frames,
as its prompt says. Latents are blocks of 2x2 pixels, so the decoder is exact. Sprites of one colour, or of two that are
near, are the known domain, on whose videos the base network is trained; those of any two colours are the new one.

# B clips, T = 4 frames, H/W = 12 pixels; c = 12 channels, t = 4, h/w = 6 rows and columns of latents
y_B3THW pixels in 0..1; z_Bcthw latents; m_BTHW masks; all float32 on the CPU
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvae_comfyui.training.vfl.conditions import Conditions
from kvae_comfyui.training.vfl.draws import Draws

SIDE, SPRITE, FRAMES, BLOCK = 12, 4, 4, 2  # pixels, pixels, frames, pixels of a latent
CELLS, WIDE = SIDE // BLOCK, SPRITE // BLOCK
CHANNELS = 3 * BLOCK * BLOCK
SHAPE = CHANNELS, FRAMES, CELLS, CELLS
PATCHES = SIDE // SPRITE  # in a row, of what stands for SigLIP's states
TEXT, GLYPHS, PICTURE = 6, 4, 3 * SPRITE * SPRITE  # widths of the conditions
DARK, NEAR = 0.25, 0.15  # the brightest background; how far the colours of a known sprite are apart at most
MEAN, STD = 0.3, 0.25  # of pixels, roughly: latents are scaled to be as strong as noise
KNOWN, NEW = "known", "new"


@dataclass(frozen=True)
class Sprites:
    """What B clips show.

    Attributes:
        tones_B23: the colours above and below.
        ground_B3: the colour of the background.
        start_B2: row and column of the upper left corner in the first frame, in blocks.
        step_B2: rows and columns that it moves between two frames, in blocks.
    """

    tones_B23: Tensor
    ground_B3: Tensor
    start_B2: Tensor
    step_B2: Tensor

    def __len__(self) -> int:
        return len(self.ground_B3)

    def __getitem__(self, which: slice | Tensor) -> Sprites:
        return Sprites(self.tones_B23[which], self.ground_B3[which], self.start_B2[which], self.step_B2[which])

    def elsewhere(self, draws: Draws) -> Sprites:
        """The same sprites on other backgrounds, at other places, on other ways."""
        return replace(sprites(len(self), NEW, draws), tones_B23=self.tones_B23)

    def clips(self) -> Tensor:
        """y_B3THW, the true clips."""
        above, below = (mask[:, None] for mask in self.tone_masks())
        tones = self.tones_B23[..., None, None, None]
        ground = self.ground_B3[..., None, None, None].expand(-1, -1, FRAMES, SIDE, SIDE)
        return torch.where(above, tones[:, 0], torch.where(below, tones[:, 1], ground))

    def masks(self) -> Tensor:
        """m_BTHW, true where the sprite is."""
        above, below = self.tone_masks()
        return above | below

    def tone_masks(self) -> tuple[Tensor, Tensor]:
        """m_BTHW of the upper and of the lower half."""
        corner_BT2 = BLOCK * (self.start_B2[:, None] + torch.arange(FRAMES)[:, None] * self.step_B2[:, None])
        rows_BTH = torch.arange(SIDE) - corner_BT2[..., :1]
        columns_BTW = torch.arange(SIDE) - corner_BT2[..., 1:]
        inside_BTW = (columns_BTW >= 0) & (columns_BTW < SPRITE)
        half = SPRITE // 2
        above, below = (((rows_BTH >= low) & (rows_BTH < low + half)) for low in (0, half))
        return above[..., :, None] & inside_BTW[..., None, :], below[..., :, None] & inside_BTW[..., None, :]


def sprites(count: int, domain: str, draws: Draws) -> Sprites:
    """Draw sprites of a domain, and ways on which they stay within the picture."""
    generator = torch.Generator().manual_seed(draws.bits())
    tones = torch.rand(count, 2, 3, generator=generator)
    if domain == KNOWN:
        apart = (2 * torch.rand(count, 3, generator=generator) - 1) * NEAR
        apart = apart * (torch.rand(count, 1, generator=generator) < 0.5)
        tones[:, 1] = (tones[:, 0] + apart).clamp(0, 1)
    ground = DARK * torch.rand(count, 3, generator=generator)
    way = torch.randint(8, (count,), generator=generator)
    way = way + (way >= 4)  # of 3x3 ways; the one in the middle stands still
    step = torch.stack([way // 3 - 1, way % 3 - 1], 1)
    room = CELLS - WIDE - (FRAMES - 1) * step.abs()
    start = (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    start = torch.where(step < 0, CELLS - WIDE - start, start)
    return Sprites(0.3 + 0.7 * tones, ground, start, step)


def encode(y_B3THW: Tensor) -> Tensor:
    """y_B3THW → z_Bcthw."""
    z = F.pixel_unshuffle(((y_B3THW - MEAN) / STD).transpose(1, 2).flatten(0, 1), BLOCK)
    return z.unflatten(0, (-1, y_B3THW.shape[2])).transpose(1, 2)


def decode(z_Bcthw: Tensor) -> Tensor:
    """z_Bcthw → y_B3THW, exactly, within 0..1."""
    y = F.pixel_shuffle(z_Bcthw.transpose(1, 2).flatten(0, 1), BLOCK)
    return (y.unflatten(0, (-1, z_Bcthw.shape[2])).transpose(1, 2) * STD + MEAN).clamp(0, 1)


def conditions(first_B3HW: Tensor, step_B2: Tensor) -> Conditions:
    """What the network is told: first frames, and ways as prompts of two tokens. Nothing is in quotes."""
    rows, columns = (F.one_hot(step_B2[:, i] + 1, 3).float() for i in range(2))
    text = torch.stack([F.pad(rows, (0, 3)), F.pad(columns, (3, 0))], 1)
    patches = F.unfold(first_B3HW, SPRITE, stride=SPRITE).transpose(1, 2)
    glyphs = torch.zeros(len(text), 1, GLYPHS)
    return Conditions(
        encode(first_B3HW[:, :, None]), patches, text, torch.ones(text.shape[:2]), glyphs, torch.zeros(len(text), 1)
    )
