"""The appearance loss: the subject of the first frame, moved as the teacher's clip moves it, pixel by pixel.

    target = moved(y_teacher, first, mask)      # what the subject should look like in each frame, and where
    loss = appearance_loss(y_student, target)

The teacher says where the subject is, and the picture says what it looks like. The subject moves as a whole here, by
whole pixels, and neither turns nor bends.

# B clips, T frames, H/W pixels; y_B3THW clips in 0..1; p_B3HW their first frames, of the same size
# m_BHW 1 on the subject in the first frame, 0 elsewhere; d_B2 pixels down and to the right
"""

from __future__ import annotations

import torch
from torch import Tensor

SEEN = 0.75  # the share of the subject that must be within a frame
LEFT = 0.1  # squared error, summed over the channels, for the rest: a uniform subject at the border would fit beyond it
MIDDLE = 0.5  # subtracted from pixels, so that sums of squares stay small

Target = tuple[
    Tensor, Tensor
]  # pictures [B, 3, T − 1, H, W] of the subject after the first frame, masks [B, 1, T − 1, …]


@torch.no_grad()
def moved(y_B3THW: Tensor, p_B3HW: Tensor, m_BHW: Tensor) -> Target:
    """The subject, in each frame after the first, where the clip looks most like it.

    Args:
        y_B3THW: the teacher's clip.
    """
    seen = torch.cat([p_B3HW, torch.ones_like(p_B3HW[:, :1])], 1) * m_BHW[:, None]
    places = displacements(y_B3THW[:, :, 1:], p_B3HW, m_BHW)
    found = torch.stack([shifted(seen, d_B2) for d_B2 in places], 2)
    return found[:, :3], found[:, 3:]


def appearance_loss(y_B3THW: Tensor, target: Target) -> Tensor:
    """The mean squared error on the moved subject, 0..1; 0 if there is no subject."""
    picture, mask = target
    error = (y_B3THW[:, :, 1:] - picture).square().mean(1, keepdim=True)
    return (error * mask).sum() / mask.sum().clamp_min(1)


def displacements(y_B3THW: Tensor, p_B3HW: Tensor, m_BHW: Tensor) -> list[Tensor]:
    """d_B2 of each frame: of all at which three quarters of the subject are seen, that of the least error, which is the
    mean square on what is seen, and LEFT for all that is not."""
    height, width = m_BHW.shape[1:]
    size = 2 * height, 2 * width  # with zeros around, so that nothing comes in again from the other side
    p, m = torch.fft.rfft2((p_B3HW - MIDDLE) * m_BHW[:, None], size), torch.fft.rfft2(m_BHW, size)
    square = torch.fft.rfft2((p_B3HW - MIDDLE).square().sum(1) * m_BHW, size)
    inside = torch.fft.rfft2(torch.ones_like(m_BHW), size)
    seen = torch.fft.irfft2(m.conj() * inside, size)
    whole = m_BHW.sum((1, 2), keepdim=True)
    allowed = seen > SEEN * whole - 0.5  # whole pixels, but for rounding
    left = LEFT * (1 - seen / whole.clamp_min(1))
    found = []
    for frame in (y_B3THW - MIDDLE).unbind(2):
        y, energy = torch.fft.rfft2(frame, size), torch.fft.rfft2(frame.square().sum(1), size)
        error = torch.fft.irfft2(square.conj() * inside + m.conj() * energy - 2 * (p.conj() * y).sum(1), size)
        error = torch.where(allowed, error / seen.clamp_min(0.5) + left, torch.inf)
        at = error.flatten(1).argmin(1)
        down, right = at // size[1], at % size[1]
        found.append(torch.stack([_signed(down, height), _signed(right, width)], 1))
    return found


def shifted(x_BCHW: Tensor, d_B2: Tensor) -> Tensor:
    """Pixels moved down and to the right; zeros come in."""
    height, width = x_BCHW.shape[2:]
    rows_BH = torch.arange(height, device=x_BCHW.device) - d_B2[:, :1]
    columns_BW = torch.arange(width, device=x_BCHW.device) - d_B2[:, 1:]
    rows, columns = rows_BH.clamp(0, height - 1)[:, :, None], columns_BW.clamp(0, width - 1)[:, None, :]
    inside = (rows == rows_BH[:, :, None]) & (columns == columns_BW[:, None, :])
    batch = torch.arange(len(x_BCHW), device=x_BCHW.device)[:, None, None]
    return x_BCHW.movedim(1, -1)[batch, rows, columns].movedim(-1, 1) * inside[:, None]


def _signed(at: Tensor, side: int) -> Tensor:
    """The places of a transform of 2 `side` values as displacements: those of the second half are negative."""
    return torch.where(at < side, at, at - 2 * side)
