"""What looks at the student's estimate of a sample's clip: the identity loss, the appearance loss, or both.

# B = 1; z_Bcthw scaled latents, y_B3THW clips and p_B3HW pictures in 0..1
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .appearance import Target, appearance_loss, moved
from .decoders import smaller
from .draws import Draws
from .identity import draw_frames, identity_loss
from .samples import Shown
from .subjects import subject_mask
from .training import LoraTraining


class Look:
    """The losses that look at one sample.

    Attributes:
        identity, appearance: what they found, once it was called; 0 before, and if it does not look at that.
    """

    def __init__(self, training: LoraTraining, shown: Shown):
        self.training, self.shown, self.device = training, shown, training.processes.device
        self.identity = self.appearance = 0.0

    def __call__(self, z_Bcthw: Tensor, teacher_Bcthw: Tensor) -> Tensor:
        """The sum of the losses by their weights, as shares of the recipe's."""
        config, unit, target = self.training.config, self.training.recipe.weight, None
        if config.appearance_weight:
            target = self._target(teacher_Bcthw)
        y_B3THW, total = self._decoded(z_Bcthw), torch.zeros((), device=self.device)
        if config.identity_weight:
            identity = self._identity(y_B3THW)
            total, self.identity = total + config.identity_weight / unit * identity, identity.item()
        if target:
            appearance = appearance_loss(y_B3THW, target)
            total, self.appearance = total + config.appearance_weight / unit * appearance, appearance.item()
        return total

    def _identity(self, y_B3THW: Tensor) -> Tensor:
        """Some frames against the anchor."""
        config, shown = self.training.config, self.shown
        frames = draw_frames(Draws(config.seed, "frames", shown.k), y_B3THW.shape[2], config.identity_frames)
        with torch.no_grad():
            anchor_BE = self.training.embed(shown.anchor_B3HW(self.device))
        return identity_loss(self.training.embed, y_B3THW, frames, anchor_BE)

    @torch.no_grad()
    def _target(self, teacher_Bcthw: Tensor) -> Target:
        """The subject of the picture, where the teacher has it."""
        y_B3THW = self._decoded(teacher_Bcthw)
        p_B3HW = self.shown.first_B3HW(self.device)
        mask_BHW = subject_mask(self.training.embed.backbone, p_B3HW, self.shown.opacity_BHW(self.device))
        p_B3HW, mask_B1HW = (F.interpolate(x, y_B3THW.shape[3:], mode="area") for x in (p_B3HW, mask_BHW[:, None]))
        return moved(y_B3THW, p_B3HW, mask_B1HW[:, 0].round())

    def _decoded(self, z_Bcthw: Tensor) -> Tensor:
        config = self.training.config
        return self.training.decode(smaller(z_Bcthw, config.decode_latents, config.decode_scale))
