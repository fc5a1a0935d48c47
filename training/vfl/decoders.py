"""Decoders that gradients pass through: what the identity loss sees of an estimate of the clip.

decode = hunyuan_decoder(pipe.vae)              # or kvae_decoder(HybridVAE(kvae, decode_adapter=adapter))
y = decode(smaller(z, latents=5, scale=0.5))

Any function of scaled latents will do. The decode is the largest part of a step's memory, so little of it is kept, and
the rest is computed again for the gradient. Counted on shapes, 17 frames of 480x848 in half size then take 3.7 GiB at
the peak with HunyuanVideo 1.5's VAE (10.4 with each residual block checkpointed, 28.7 with nothing), 7.5 with KVAE.

# z_Bcthw scaled latents of HunyuanVideo 1.5, c = 32; y_B3THW float32 pixels in 0..1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...adapters import HybridVAE
from ...adapters.spaces import latent_space

Decode = Callable[[Tensor], Tensor]  # z_Bcthw → y_B3THW
SPACE = latent_space("hunyuan_video_1.5")


def hunyuan_decoder(vae: Any) -> Decode:
    """AutoencoderKLHunyuanVideo15 as a decoder. It is frozen, and keeps little for gradients from now on."""
    vae.requires_grad_(False)
    vae.enable_slicing()  # its attention fails for batches
    vae.enable_gradient_checkpointing()  # of the middle and of each level
    decoder = vae.decoder
    for level in (decoder.mid_block, *decoder.up_blocks):
        for block in level.resnets:
            block.forward = partial(_residual, block)
    norm, conv = (partial(type(part).forward, part) for part in (decoder.norm_out, decoder.conv_out))
    decoder.norm_out.forward = decoder.conv_act.forward = lambda x: x
    decoder.conv_out.forward = lambda x: again(partial(_normed, norm, F.silu, conv), x)
    return lambda z: _pixels(vae.decode(SPACE.unscale(z).to(vae.dtype)).sample)


again = partial(checkpoint, use_reentrant=False)  # computed again for the gradient, from its input


def _residual(block: Any, x_BCTHW: Tensor) -> Tensor:
    """A residual block of diffusers' VAE. What it keeps is its input and what is between its convolutions."""
    h = again(partial(_normed, block.norm1, block.nonlinearity, block.conv1), x_BCTHW)
    h = again(partial(_normed, block.norm2, block.nonlinearity, block.conv2), h)
    return h + (x_BCTHW if block.conv_shortcut is None else block.conv_shortcut(x_BCTHW))


def _normed(norm: Any, activation: Any, conv: Any, x_BCTHW: Tensor) -> Tensor:
    """Norm and activation frame by frame, since in float32 they are the largest of all; then the convolution."""
    return conv(torch.cat([again(lambda x: activation(norm(x)), frame) for frame in x_BCTHW.split(1, dim=2)], dim=2))


def kvae_decoder(vae: HybridVAE) -> Decode:
    """A KVAE with an adapter of HunyuanVideo 1.5's latents. It is frozen, and checkpointed from now on.

    Raises:
        ValueError: it decodes other latents.
    """
    if vae.space != SPACE:
        raise ValueError(f"the KVAE decodes {vae.space.name}; expected an adapter of {SPACE.name}")
    vae.requires_grad_(False)
    vae.kvae.decoder.gradient_checkpointing = True
    dtype = next(vae.kvae.parameters()).dtype
    return lambda z: _pixels(vae.decode(SPACE.unscale(z).to(dtype)))


def smaller(z_Bcthw: Tensor, latents: int = 0, scale: float = 1.0) -> Tensor:
    """The first latents of a clip, in a smaller picture.

    Args:
        latents: how many; 0 keeps all. n latents are 4n − 3 frames, decoded exactly: the VAEs are causal.
        scale: of rows and columns, which are averaged; 1 keeps them.
    """
    z = z_Bcthw[:, :, :latents] if latents else z_Bcthw
    size = [max(1, round(side * scale)) for side in z.shape[3:]]
    return z if size == list(z.shape[3:]) else F.interpolate(z, (z.shape[2], *size), mode="area")


def _pixels(x_B3THW: Tensor) -> Tensor:
    return (x_B3THW.float() / 2 + 0.5).clamp(0, 1)
