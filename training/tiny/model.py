"""The small VAEs: how they are built, initialised, and reduced to their skeletons.

All have the true architectures, with few channels: KVAE-3D-1.0 and AutoencoderKLHunyuanVideo, whose latents stand for
4x8x8 pixels, and KVAE-3D-2.0-t4s16 and AutoencoderKLHunyuanVideo15, whose latents stand for 4x16x16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from torch import Tensor, nn

from ...kvae import KVAE, KVAEConfig, WeightsError, load_kvae
from ...kvae.config import FAMILY
from ...kvae.layers import ResnetBlock
from ..hunyuan_attention import attend_frame_by_frame
from ..vaes import load_hunyuan_vae
from .parts import Hunyuan15Parts, KVAEParts, Parts

# rows (and columns) of pixels that a latent stands for, and its channels
MODELS = {"kvae": (8, 16), "hunyuan": (8, 16), "kvae-t4s16": (16, 64), "hunyuan-1.5": (16, 32)}
# Channels of the levels. Those of the second pair are narrow where there are many pixels, and what oneDNN is fast with.
WIDTHS = (16, 32, 64, 80)
T4S16_WIDTHS = (8, 16, 48, 48, 64), (8, 16, 48, 64, 64)  # of encoder and decoder
HUNYUAN_15_WIDTHS = (8, 16, 16, 64, 64)
START_LOGVAR = -9.0


def build(model: str, start_from: str = "") -> Any:
    """A small VAE to train: a new one, or one from a file.

    Args:
        model: one of MODELS.
        start_from: weights file of an earlier result; empty for new weights.

    Raises:
        WeightsError: the file is not a VAE of this kind.
    """
    if start_from:
        vae = _load(model, start_from).train().requires_grad_(True)
    else:
        vae = _new(model)
        initialise_hunyuan_15(vae) if model == "hunyuan-1.5" else initialise(vae)
    if model == "hunyuan-1.5":
        attend_frame_by_frame(vae.encoder)  # diffusers' attention fails for batches
        attend_frame_by_frame(vae.decoder)
    return vae


def _load(model: str, path: str) -> Any:
    vae: Any = load_kvae(path) if model.startswith("kvae") else load_hunyuan_vae(path, "cpu").vae
    if isinstance(vae, KVAE):
        side, channels = vae.config.spatial_factor, vae.config.z_channels
    else:
        side, channels = getattr(vae.config, "spatial_compression_ratio", 8), vae.config.latent_channels
        vae.disable_slicing()
    if (side, channels) != MODELS[model]:
        raise WeightsError(f"{path}: it has {channels} channels for {side}x{side} pixels; that is not --model {model}")
    return vae


def _new(model: str) -> Any:
    if model == "kvae":
        return KVAE(KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, norm_groups=8))
    if model == "kvae-t4s16":
        encoder, decoder = T4S16_WIDTHS
        return KVAE(replace(FAMILY["2.0-t4s16"], encoder_widths=encoder, decoder_widths=decoder, num_res_blocks=1))
    if model == "hunyuan":
        return AutoencoderKLHunyuanVideo(block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4)
    return AutoencoderKLHunyuanVideo15(block_out_channels=HUNYUAN_15_WIDTHS, layers_per_block=1)


@torch.no_grad()
def initialise(vae: Any) -> None:
    """Make residual branches zero, 1x1x1 convolutions orthogonal, and biases before the last norms wide."""
    kvae = isinstance(vae, KVAE)
    for name, module in vae.named_modules():
        if name.endswith((".conv2.conv", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith((".conv_y", ".conv_b")):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.constant_(module.bias, float(name.endswith("y")))
        elif isinstance(module, nn.Conv3d) and module.kernel_size == (1, 1, 1):
            module.weight.copy_(nn.init.orthogonal_(torch.empty(module.weight.shape[:2]))[..., None, None, None])
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv3d) and not kvae and ("samplers" in name or "conv_in" in name):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if kvae:
        last_shortcuts = vae.encoder.down[-1].block[0].nin_shortcut, vae.decoder.up[0].block[0].nin_shortcut
        encoder_bias = vae.encoder.conv_out.conv.bias
    else:
        levels = vae.encoder.down_blocks[-1], vae.decoder.up_blocks[-1]
        last_shortcuts = tuple(level.resnets[0].conv_shortcut.conv for level in levels)
        encoder_bias = vae.quant_conv.bias
    for conv in last_shortcuts:
        # the Hunyuan decoder has no other way around its last GroupNorm; KVAE's norms see the latent itself
        nn.init.normal_(conv.bias, std=1.0 if kvae else 3.0)
    encoder_bias[len(encoder_bias) // 2 :] = START_LOGVAR


@torch.no_grad()
def initialise_hunyuan_15(vae: Any) -> None:
    """Make residual branches zero; PyTorch initialises the rest."""
    for name, module in vae.named_modules():
        if name.endswith((".conv2.conv", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    vae.encoder.conv_out.conv.bias[vae.config.latent_channels :] = START_LOGVAR


def parts_of(vae: Any) -> Parts:
    """The parts of a VAE whose latents stand for 4x16x16 pixels."""
    return KVAEParts(vae) if isinstance(vae, KVAE) else Hunyuan15Parts(vae)


@contextmanager
def skeleton() -> Iterator[None]:
    """Until the context ends, every residual block is its shortcut; not those of HunyuanVideo 1.5."""
    ours: Any = ResnetBlock
    theirs: Any = HunyuanVideoResnetBlockCausal3D
    forwards = ours.forward, theirs.forward
    ours.forward = lambda block, x, cache, z=None: block.shortcut(x)
    theirs.forward = lambda block, x: x if block.conv_shortcut is None else block.conv_shortcut(x)
    try:
        yield
    finally:
        ours.forward, theirs.forward = forwards


def posterior_of(vae: Any, x: Tensor) -> Any:
    """The posterior of pixels, with `mean` and `logvar`, from either VAE."""
    return vae.posterior(x) if isinstance(vae, KVAE) else vae.encode(x).latent_dist


def decode(vae: Any, z: Tensor) -> Tensor:
    """Latents → pixels, by either VAE."""
    return vae.decode(z) if isinstance(vae, KVAE) else vae.decode(z).sample
