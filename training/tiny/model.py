"""The small VAEs: how they are built, initialised, and reduced to their skeletons.

Both have the true architectures: KVAE-3D-1.0 and AutoencoderKLHunyuanVideo, with few channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from torch import Tensor, nn

from ...kvae import KVAE, KVAEConfig, load_kvae
from ...kvae.layers import ResnetBlock
from ..vaes import load_hunyuan_vae

WIDTHS = (16, 32, 64, 80)  # channels of the levels
START_LOGVAR = -9.0


def build(model: str, start_from: str = "") -> Any:
    """A small VAE to train: a new one, or one from a file.

    Args:
        model: "kvae" or "hunyuan".
        start_from: weights file of an earlier result; empty for new weights.

    Raises:
        WeightsError: the file is not a VAE of this kind.
    """
    if start_from:
        load = load_kvae if model == "kvae" else lambda path: load_hunyuan_vae(path, "cpu").vae
        return load(start_from).train().requires_grad_(True)
    if model == "kvae":
        vae: Any = KVAE(KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, norm_groups=8))
    else:
        vae = AutoencoderKLHunyuanVideo(block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4)
    initialise(vae)
    return vae


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


@contextmanager
def skeleton() -> Iterator[None]:
    """Until the context ends, every residual block of either architecture is its shortcut."""
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
