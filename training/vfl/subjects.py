"""Where the subject is in a picture: where it is opaque, or where DINOv3 sees something else than at the border.

    mask = subject_mask(backbone, picture, alpha)

# p_B3HW pictures in 0..1; a_BHW their opacity in 0..1; m_BHW 1 on the subject, 0 elsewhere; float32
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .identity import Backbone

OPAQUE = 0.5  # the opacity from which on a pixel is the subject's
FAR = 0.5  # of the distance of the most distant patch: what is farther than that from the border is the subject


def subject_mask(backbone: Backbone, p_B3HW: Tensor, a_BHW: Tensor | None = None) -> Tensor:
    """m_BHW of a picture's opacity, or without it of DINOv3's features."""
    return feature_mask(backbone, p_B3HW) if a_BHW is None else (a_BHW > OPAQUE).float()


@torch.no_grad()
def feature_mask(backbone: Backbone, p_B3HW: Tensor) -> Tensor:
    """m_BHW: the patches whose states are farther from the border's median than half of the most distant one's."""
    x_BDhw = backbone.patches(p_B3HW)
    border = torch.cat([x_BDhw[..., [0, -1], :].flatten(2), x_BDhw[..., [0, -1]].flatten(2)], 2).median(2).values
    far = (x_BDhw - border[..., None, None]).norm(dim=1)
    mask = far > FAR * far.amax((1, 2), keepdim=True)
    return F.interpolate(mask[:, None].float(), p_B3HW.shape[2:], mode="nearest")[:, 0]
