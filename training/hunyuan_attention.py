"""The causal attention of HunyuanVideo's VAEs, frame by frame, for clips of any length.

diffusers makes a mask of all pairs of positions: 128 GB for 121 frames of 960x544. A frame that is given the keys and
values of its own and earlier frames only needs none, and has the same result.

# B batch, C channels, T frames, H/W rows and columns, N = THW positions; q, k, v [B, heads, N, C]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend_frame_by_frame(coder: Any) -> None:
    """Replace the attention in an encoder or decoder of AutoencoderKLHunyuanVideo or AutoencoderKLHunyuanVideo15.

    The latter's then computes batches too. Names of weights stay.
    """
    block = coder.mid_block
    newer = hasattr(block.attentions[0], "proj_out")
    coder.mid_block = _MiddleBlock(block.resnets, block.attentions, _newer if newer else _older)


class _MiddleBlock(nn.Module):
    """Residual blocks with attention between them, as diffusers' middle blocks."""

    def __init__(self, resnets: nn.ModuleList, attentions: nn.ModuleList, attend: Any):
        super().__init__()
        self.resnets, self.attentions, self.attend = resnets, attentions, attend

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = self.resnets[0](x_BCTHW)
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:], strict=True):
            x = resnet(x if attention is None else self.attend(attention, x))
        return x


def _older(attention: Any, x_BCTHW: Tensor) -> Tensor:
    """HunyuanVideo's: diffusers' Attention, with a GroupNorm and linear maps."""
    x_BCN = x_BCTHW.flatten(2)
    normed = attention.group_norm(x_BCN).transpose(1, 2)
    q, k, v = (
        linear(normed).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for linear in (attention.to_q, attention.to_k, attention.to_v)
    )
    y = attention.to_out[0](_causal(q, k, v, x_BCTHW.shape[2]).transpose(1, 2).flatten(2))
    y = y.transpose(1, 2) + (x_BCN if attention.residual_connection else 0)
    return (y / attention.rescale_output_factor).view_as(x_BCTHW)


def _newer(attention: Any, x_BCTHW: Tensor) -> Tensor:
    """HunyuanVideo 1.5's: an RMS norm, and convolutions of 1x1x1."""
    normed = attention.norm(x_BCTHW)
    q, k, v = (
        conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (attention.to_q, attention.to_k, attention.to_v)
    )
    y = _causal(q, k, v, x_BCTHW.shape[2])[:, 0].transpose(1, 2)
    return attention.proj_out(y.reshape(x_BCTHW.shape)) + x_BCTHW


def _causal(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    size = q.shape[2] // frames
    ends = range(size, q.shape[2] + 1, size)
    parts = [F.scaled_dot_product_attention(q[:, :, e - size : e], k[:, :, :e], v[:, :, :e]) for e in ends]
    return torch.cat(parts, dim=2)
