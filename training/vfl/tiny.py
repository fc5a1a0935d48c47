"""A HunyuanVideo 1.5 image-to-video pipeline with small random weights: everything runs in it, and nothing is meant.

save_tiny(folder)               # 34 MB (one of its layers is 2048 wide in any size), as a model is downloaded
pipe = load_pipeline(folder)    # of `base`

A clip of 9 frames in 32x32 pixels is [1, 32, 3, 2, 2] in latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...kvae.paths import write_text
from .base import SIZES, set_sizes

SIDE = 32  # pixels of a square picture; the pipeline's target_size
IMAGE_TOKENS = 4  # of SigLIP: 28 px in patches of 14
BACKBONE_WIDTH = 32  # of DINOv3
SYSTEM = "Describe."
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_pipeline(seed: int = 0) -> Any:
    """HunyuanVideo15ImageToVideoPipeline with random weights, in float32 on the CPU, in eval mode.

    The same seed gives the same weights. The global generator is left as it was.
    """
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, HunyuanVideo15ImageToVideoPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"transformer": _transformer(), "vae": _vae()} | _text_parts() | _picture_parts()
    guider, scheduler = ClassifierFreeGuidance(6.0), FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe: Any = HunyuanVideo15ImageToVideoPipeline(**parts, guider=guider, scheduler=scheduler)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    set_sizes(pipe, _sizes(pipe.tokenizer))
    return pipe


def save_tiny(folder: Path, seed: int = 0) -> None:
    """Write the tiny pipeline as diffusers does, and beside it the sizes that it keeps in no config."""
    pipe = tiny_pipeline(seed)
    pipe.save_pretrained(folder)
    write_text(folder / SIZES, json.dumps(_sizes(pipe.tokenizer)))


def tiny_dinov3(seed: int = 0) -> Any:
    """DINOv3ViTModel, 32 wide, with random weights, in float32 on the CPU, in eval mode. It takes any multiple of 8."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": SIDE}
        return DINOv3ViTModel(
            DINOv3ViTConfig(hidden_size=BACKBONE_WIDTH, intermediate_size=2 * BACKBONE_WIDTH, **shape)
        ).eval()


def _transformer() -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    transformer: Any = HunyuanVideo15Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=2,
        text_embed_dim=16,
        text_embed_2_dim=24,
        image_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
        target_size=SIDE,
    )
    nn.init.normal_(transformer.cond_type_embed.weight, std=0.1)  # diffusers leaves it to the checkpoint
    return transformer


def _vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo15

    # the last level must be at least twice as wide as the latents' 32 channels
    return AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 32, 64, 64), layers_per_block=1)


def _text_parts() -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        Qwen2Tokenizer,
        T5Config,
        T5EncoderModel,
    )

    symbols = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": symbols[-2:]})
    tokenizer.chat_template = CHAT
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=rope,
        bos_token_id=256,
        eos_token_id=258,
    )
    t5 = T5Config(
        vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen2_5_VLTextModel(qwen),
        "tokenizer_2": ByT5Tokenizer(),
        "text_encoder_2": T5EncoderModel(t5),
    }


def _picture_parts() -> dict[str, Any]:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    size = {"height": 28, "width": 28}
    shape: dict[str, Any] = {
        "hidden_size": 20,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = SiglipVisionConfig(image_size=28, patch_size=14, **shape)
    return {"image_encoder": SiglipVisionModel(config), "feature_extractor": SiglipImageProcessor(size=size)}


def _sizes(tokenizer: Any) -> dict[str, Any]:
    turn = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return {
        "system_message": SYSTEM,
        "prompt_template_encode_start_idx": len(tokenizer(turn).input_ids),
        "tokenizer_max_length": 64,
        "tokenizer_2_max_length": 32,
        "vision_num_semantic_tokens": IMAGE_TOKENS,
    }
