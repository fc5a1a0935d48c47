"""Small VAEs of many architectures with random weights, which map real clips to latents nobody has trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
)
from torch import Tensor

from kvae_comfyui.kvae import KVAE, KVAEConfig
from kvae_comfyui.kvae.pixels import HUNYUAN_HALF_RANGE, to_unit

Encode = Callable[[Tensor], Tensor]  # uint8 [B, 3, T, H, W] → raw latents [B, C, t, h, w]

WIDTHS = (8, 16, 16, 16)
COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 16,
}
WAN_22 = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "decoder_base_dim": 8}
COSMOS = {
    "encoder_block_out_channels": WIDTHS, "decode_block_out_channels": WIDTHS, "num_layers": 1,
    "attention_resolutions": (), "resolution": 128,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "kvae-1.0": lambda: KVAE(KVAEConfig((32, 32, 64, 64), (32, 32, 64, 64), num_res_blocks=1)),
    "kvae-2.0-t4s8": lambda: KVAE(
        KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, norm="rms", downsample_version=2),
    ),
    "hunyuan": lambda: AutoencoderKLHunyuanVideo(block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4),
    "wan-2.1": lambda: AutoencoderKLWan(base_dim=8),
    "cogvideox": lambda: AutoencoderKLCogVideoX(**COGVIDEOX),
    "cosmos": lambda: AutoencoderKLCosmos(**COSMOS),
    "12-channels": lambda: KVAE(KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, z_channels=12, norm="rms")),
    "hunyuan-1.5": lambda: AutoencoderKLHunyuanVideo15(
        block_out_channels=(16, 32, 64, 64, 64), layers_per_block=1, latent_channels=32
    ),
    "wan-2.2": lambda: AutoencoderKLWan(base_dim=8, z_dim=48, scale_factor_spatial=16, **WAN_22),
    "64-channels": lambda: KVAE(KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, z_channels=64, norm="rms")),
}


def random_vaes() -> Iterator[tuple[str, Encode]]:
    """Each VAE's name and its encoder: the mode of the posterior."""
    for seed, (name, build) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        yield name, _encoder(build().eval())


def _encoder(vae: Any) -> Encode:
    @torch.inference_mode()
    def encode(x_B3THW: Tensor) -> Tensor:
        x = to_unit(x_B3THW, HUNYUAN_HALF_RANGE)
        if isinstance(vae, KVAE):
            return vae.encode(x).float()
        found = vae.encode(x)
        return found.latent_dist.mode().float()

    return encode
