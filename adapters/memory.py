"""How much memory a KVAE needs beside its weights, so that a host can make room before it starts.

The peak lies at full resolution, where a block holds its input, its norm, the padded copy its convolution reads and its
output, and where every causal layer keeps two frames for the next segment. Counted tensor by tensor on the published
network, at bfloat16 and 720p: 44.8 GB to decode and 28.0 GB to encode segments of 17 frames, 9.2 and 4.3 GB for a
single frame. The lines below pass 0.5 to 17 % above what was counted for 1, 5 and 17 frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kvae import SEGMENT_FRAMES, KVAEConfig

WORKSPACE = 1.1  # what the convolution library takes for itself


def decode_bytes(config: KVAEConfig, z_shape: Sequence[int], dtype: torch.dtype) -> float:
    """Peak of decoding latents [..., t, h, w], one clip at a time, frames leaving the device segment by segment."""
    t, h, w = z_shape[-3:]
    frames = min(config.temporal_compress_times * (t - 1), SEGMENT_FRAMES) + 1
    pixels = h * w * config.spatial_factor**2
    return WORKSPACE * config.ch * (9.6 * frames + 30) * pixels * dtype.itemsize


def encode_bytes(config: KVAEConfig, x_shape: Sequence[int], dtype: torch.dtype) -> float:
    """Peak of encoding pixels [..., T, H, W]: one segment's activations, beside the clip itself."""
    T, H, W = x_shape[-3:]
    frames = min(T, SEGMENT_FRAMES + 1)
    clip = 3 * T * H * W * (torch.float32.itemsize + dtype.itemsize)
    return WORKSPACE * config.ch * (6.3 * frames + 12) * H * W * dtype.itemsize + clip
