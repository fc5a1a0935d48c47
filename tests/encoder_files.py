"""Options that name an encoder for each architecture: tiny ones where this project has them, else small random ones."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import save_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.kvae import save_kvae
from small_models import small

NEWER = "hunyuan_video_1.5"


def kvae_options(folder: Path, architecture: str) -> list[str]:
    """A KVAE and an adapter that make latents of the architecture."""
    if architecture != NEWER:
        return ["--encoder", "kvae"]
    kvae, adapter = folder / "kvae.safetensors", folder / "k2h.safetensors"
    if not adapter.exists():
        save_kvae(kvae, small("2.0-t4s16"), torch.float32, {})
        source, target = SPACES["kvae_3d_2.0_t4s16"], SPACES[NEWER]
        save_adapter(adapter, LatentAdapter(Affine(source.channels, target.channels), source, target))
    return ["--encoder", "kvae", "--kvae", str(kvae), "--adapter-k2h", str(adapter)]


def hunyuan_options(folder: Path, architecture: str) -> list[str]:
    """The architecture's own VAE."""
    if architecture != NEWER:
        return []
    if not (folder / "vae").exists():
        AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 16, 32, 64), layers_per_block=1).save_pretrained(
            folder / "vae"
        )
    return ["--hunyuan-vae", str(folder / "vae")]


def siglip_options(folder: Path) -> list[str]:
    """A small random SigLIP in a folder as musubi-tuner reads it."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **sizes))
    model.save_pretrained(folder / "siglip" / "image_encoder")
    return ["--i2v", "--image-encoder", str(folder / "siglip")]
