"""What the trainer of the identity head shows of a picture: a part of it, at random, and changed as an estimate of a
clip may be. All is a function of the seed, the step and the picture.

# S side of the square that DINOv3 is given
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws
from .identity import resized
from .pictures import BLACK, jittered, read_picture

GREY = (0.299, 0.587, 0.114)  # of a colour, by ITU-R BT.601


@dataclass(frozen=True)
class Views:
    """How pictures are shown.

    Attributes:
        side: S.
        ratio, jitter: of the crop, see `pictures.jittered`; 1 and 0 show the whole picture.
        flip: whether half of the pictures are mirrored.
        colour: brightness, contrast and saturation are each changed by a factor of 1 ± this at most.
        blur: standard deviation of a Gaussian blur at most, in pixels of the square.
        noise: standard deviation of Gaussian noise at most, in pixels of 0..1 of the square.
        background: colour under transparent parts.
    """

    side: int
    ratio: float = 0.9
    jitter: float = 0.06
    flip: bool = False
    colour: float = 0.0
    blur: float = 0.0
    noise: float = 0.1
    background: tuple[int, int, int] = BLACK

    def whole(self, data: bytes) -> Tensor:
        """The file of a picture as it is, float32 [3, S, S] in 0..1.

        Raises:
            PictureError: it cannot be read.
        """
        return _square(read_picture(data, self.background), self.side)

    def at(self, seed: int, step: int) -> Callable[[bytes], Tensor]:
        """Views of a step: from the file of a picture to float32 [3, S, S] in 0..1.

        Raises, when it is called:
            PictureError: it cannot be read.
        """
        return lambda data: self._seen(data, Draws(seed, "view", step, hashlib.sha256(data).hexdigest()))

    def _seen(self, data: bytes, draws: Draws) -> Tensor:
        picture = read_picture(data, self.background)
        height, width = picture.shape[1:]
        box = jittered(height, width, self.ratio, self.jitter, draws)
        p = _square(picture[:, box.top : box.bottom, box.left : box.right], self.side)
        if draws.unit() < 0.5 and self.flip:
            p = p.flip(-1)
        p = recoloured(p, *(draws.between(1 - self.colour, 1 + self.colour) for _ in range(3)))
        p = blurred(p, draws.between(0, self.blur))
        return noisy(p, draws.between(0, self.noise), draws.bits())


def recoloured(p_3HW: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """A picture in 0..1 with other colours; factors of 1 change nothing."""
    if brightness == contrast == saturation == 1:
        return p_3HW
    p = p_3HW * brightness
    p = p.mean() + contrast * (p - p.mean())
    grey = (p * torch.tensor(GREY)[:, None, None]).sum(0, keepdim=True)
    return (grey + saturation * (p - grey)).clamp(0, 1)


def blurred(p_3HW: Tensor, sigma: float) -> Tensor:
    """A picture under a Gaussian of this standard deviation, in pixels; its border is repeated outside."""
    reach = min(int(3 * sigma + 0.5), min(p_3HW.shape[1:]) - 1)
    if not reach:
        return p_3HW
    weights = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    p = F.pad(p_3HW[None], (reach,) * 4, mode="replicate")
    p = F.conv2d(F.conv2d(p, weights, groups=3), weights.mT, groups=3)
    return p[0]


def noisy(p_3HW: Tensor, sigma: float, seed: int) -> Tensor:
    """A picture in 0..1 with Gaussian noise of this standard deviation."""
    if not sigma:
        return p_3HW
    return (p_3HW + sigma * torch.randn(p_3HW.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def _square(picture: Tensor, side: int) -> Tensor:
    return resized(picture[None].float() / 255, side)[0]
