"""What a LoRA is trained on: pictures by the law of sampling, their states and those of their prompts from the cache.

    source = Source(Index(root, "train"), open_cache(cache), PromptBank(), seed=0, p_secondary=0.1)
    shown = source(k)                                   # a pure function of the seed and k
    given = shown.given("cuda", torch.bfloat16)

# p_B3HW pictures in 0..1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .condition_files import ConditionFiles
from .conditions import Conditions, Picture, Text, conditions
from .draws import Draws
from .index import Index
from .path import noise
from .pictures import cropped, read_opacity, read_picture
from .prompts import PromptBank


@dataclass(frozen=True)
class Shown:
    """One sample, on the CPU.

    Attributes:
        k: its number in the run.
        text, picture: what the network is told.
        first: uint8 [3, H, W], the picture as it is cropped.
        opacity: of that picture, grey as uint8 [3, H, W]; None if it is opaque or was not asked for.
        anchor: uint8 [3, H, W], what the identity loss compares with: the picture as it is cropped, or another one of
            the identity in the same size.
        skipped: the pictures that could not be read on the way, as "id: reason".
    """

    k: int
    text: Text
    picture: Picture
    first: Tensor
    opacity: Tensor | None
    anchor: Tensor
    skipped: tuple[str, ...] = ()

    def given(self, device: str | torch.device, dtype: torch.dtype) -> Conditions:
        """The conditions, as a batch of one."""
        return conditions([self.text], [self.picture], device, dtype)

    def anchor_B3HW(self, device: str | torch.device) -> Tensor:
        """The anchor, as a batch of one."""
        return self.anchor[None].to(device).float() / 255

    def first_B3HW(self, device: str | torch.device) -> Tensor:
        """The picture, as a batch of one."""
        return self.first[None].to(device).float() / 255

    def opacity_BHW(self, device: str | torch.device) -> Tensor | None:
        """The picture's opacity in 0..1, as a batch of one."""
        return None if self.opacity is None else self.opacity[:1].to(device).float() / 255

    def noise(self, seed: int, frames: int) -> Tensor:
        """The start of its path, x_Bcthw, float32 on the CPU."""
        channels, _, h, w = self.picture.latent.shape
        return noise(seed, self.k, (1, channels, (frames - 1) // 4 + 1, h, w))


class Source:
    """The samples of a split. It may be called from several threads at once.

    Args:
        p_secondary: the probability of another picture of the identity as the anchor.
        opacity: whether samples have their picture's.
        whole: whether pictures are shown whole, as in validation, though the cache has parts of them.
    """

    def __init__(
        self,
        index: Index,
        files: ConditionFiles,
        bank: PromptBank,
        seed: int,
        p_secondary: float = 0.0,
        opacity: bool = False,
        whole: bool = False,
    ):
        self.index, self.files, self.bank = index, files, bank
        self.seed, self.p_secondary, self.opacity, self.whole = seed, p_secondary, opacity, whole

    def __call__(self, k: int) -> Shown:
        """Sample k of the run.

        Raises:
            UserError: no picture of its identity can be read, or the cache lacks the picture or its prompt.
            WeightsError: a file is damaged.
        """
        sample = self.index.sample(self.seed, k, self.p_secondary, lambda data: (data, read_picture(data)))
        data, picture = sample.picture
        height, width = picture.shape[1:]
        crop = None if self.whole else Draws(self.seed, "crop", k).below(self.files.info.crops)
        box, size = self.files.info.view(data, height, width, crop)
        first, opacity = cropped(picture, box, size), read_opacity(data) if self.opacity else None
        opacity = None if opacity is None else cropped(opacity, box, size)
        anchor = first if sample.secondary is None else cropped(sample.secondary[1], None, size)
        text = self.files.text(self.bank.prompt(self.seed, k))
        return Shown(k, text, self.files.picture(data, box, size), first, opacity, anchor, sample.skipped)
