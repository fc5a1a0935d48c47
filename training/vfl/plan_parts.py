"""The parts of a training that plan.py adds up, counted on tensors without data.

# n tokens of the clip, m of texts and picture; h/w latent rows and columns
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ...adapters import HybridVAE, LatentAdapter
from ...adapters.networks import Affine
from ...adapters.spaces import grid_ratios, native_space
from ...kvae import KVAE, KVAEConfig
from .appearance import Target, appearance_loss, moved
from .count import counted
from .decoders import SPACE, Decode, hunyuan_decoder, kvae_decoder, smaller
from .draws import Draws
from .identity import Backbone, Embedder, Head, draw_frames, identity_loss
from .lora import add_lora, lora_layers
from .placement import BASE_DTYPES, COMPUTED, STORED

PIXELS, FRAMES = SPACE.spatial_factor, SPACE.temporal_factor  # of a latent
PICTURE_TOKENS = 729  # of SigLIP


def latent_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a clip."""
    return (frames - 1) // FRAMES + 1, height // PIXELS, width // PIXELS


class Network(NamedTuple):
    """The network with its LoRA, in bytes.

    Attributes:
        block, rest: the frozen weights of a block, and of all that is no block.
        lora: in float32.
        inputs: what the checkpoints of all blocks keep.
        peak: of one block's pass with gradients, in addition.
        operations: of a pass without gradients.
    """

    blocks: int
    block: int
    rest: int
    lora: int
    inputs: int
    peak: int
    operations: float


def count_network(
    config: Mapping[str, Any], frames: int, height: int, width: int, base_dtype: str, targets: str, rank: int, text: int
) -> Network:
    """Count one block, and multiply it. The same arguments are counted once.

    Args:
        config: of HunyuanVideo15Transformer3DModel.
        text: tokens of texts.
    """
    return _count_network(json.dumps(dict(config)), frames, height, width, base_dtype, targets, rank, text)


@cache
def _count_network(
    described: str, frames: int, height: int, width: int, base_dtype: str, targets: str, rank: int, text: int
) -> Network:
    from diffusers import HunyuanVideo15Transformer3DModel as Transformer

    config = json.loads(described)
    with torch.device("meta"):
        one: Any = Transformer.from_config({**config, "num_layers": 1}).to(BASE_DTYPES[base_dtype])
        add_lora(one, targets, rank, rank)
    block, blocks = one.transformer_blocks[0], config["num_layers"]
    lora = blocks * _bytes(block, trained=True) + _bytes(one, trained=True) - _bytes(block, trained=True)
    rest = _bytes(one) - _bytes(block)
    if base_dtype == "fp8":
        _narrow(block)
    given = _inputs(one, frames, height, width, text)
    autocast = None if base_dtype == "fp32" else COMPUTED
    if autocast:
        for _, layer in lora_layers(one):
            layer.cast_input_dtype_enabled = False
    with counted(autocast) as count:
        outputs = checkpoint(block, *given, use_reentrant=False)
        torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])
    with torch.no_grad(), counted(autocast), FlopCounterMode(display=False) as flops:
        block(*given)
    kept = blocks * sum(each.nbytes for each in given[:2])
    return Network(blocks, _bytes(block), rest, lora, kept, count.peak, float(blocks * flops.get_total_flops()))


def _narrow(block: nn.Module) -> None:
    """Store the matrices of a block as `place` does for fp8."""
    for layer in block.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(STORED)


def _inputs(one: Any, frames: int, height: int, width: int, text: int) -> tuple[Any, ...]:
    """What a block is called with."""
    size = latent_size(frames, height, width)
    options: dict[str, Any] = {"device": "meta", "dtype": one.x_embedder.proj.weight.dtype}
    p, p_t = one.config.patch_size, one.config.patch_size_t
    n, m = size[0] // p_t * (size[1] // p) * (size[2] // p), text + PICTURE_TOKENS
    inner = one.config.num_attention_heads * one.config.attention_head_dim
    with torch.device("meta"):
        angles = one.rope(torch.empty(1, 1, *size))
    h, e = (torch.empty(1, length, inner, requires_grad=True, **options) for length in (n, m))
    return h, e, torch.empty(1, inner, **options), torch.ones(1, m, device="meta", dtype=torch.bool), angles


class Look(NamedTuple):
    """What looks at the clip, in bytes: the weights of decoder and DINOv3, and what the gradient needs at its peak."""

    decoder: int
    backbone: int
    peak: int


def count_look(
    decoder: Mapping[str, Any] | KVAEConfig, backbone: Mapping[str, Any], dtype: torch.dtype, z: tuple[int, int, int],
    latents: int, scale: float, frames: int, appearance: bool = False,
) -> Look:  # fmt: skip
    """Count the losses that look at the clip. The same arguments are counted once.

    Args:
        decoder: a config of AutoencoderKLHunyuanVideo15 or of a KVAE.
        backbone: a config of DINOv3ViTModel.
        z: latent frames, rows and columns of a clip.
        frames: that the identity loss looks at; 0 without it.
        appearance: whether there is the appearance loss.
    """
    described = decoder if isinstance(decoder, KVAEConfig) else json.dumps(dict(decoder))
    kept = min(latents, z[0]) if latents else z[0]
    return _count_look(described, json.dumps(dict(backbone)), dtype, (kept, *z[1:]), scale, frames, appearance)


@cache
def _count_look(
    decoder: str | KVAEConfig, backbone: str, dtype: torch.dtype, z: tuple[int, int, int], scale: float, frames: int,
    appearance: bool,
) -> Look:  # fmt: skip
    with torch.device("meta"):
        vae, decode = _decoder(decoder, dtype)
        embedder = _embedder(json.loads(backbone), dtype)
        z_Bcthw = torch.empty(1, SPACE.channels, *z, requires_grad=True)
        anchor = torch.empty(1, embedder.head.dims[-1])
        with counted() as count:
            target, losses = _target(decode, z_Bcthw, scale) if appearance else None, []
            y = decode(smaller(z_Bcthw, scale=scale))
            if frames:
                chosen = draw_frames(Draws(0, "frames", 0), y.shape[2], frames)
                losses.append(identity_loss(embedder, y, chosen, anchor))
            if target:
                losses.append(appearance_loss(y, target))
            torch.autograd.grad(losses, z_Bcthw)
    return Look(_bytes(vae), _bytes(embedder), count.peak)


@torch.no_grad()
def _target(decode: Decode, z_Bcthw: Tensor, scale: float) -> Target:
    y = decode(smaller(z_Bcthw, scale=scale))
    return moved(y, y[:, :, 0], y[:, 0, 0])


def _decoder(config: str | KVAEConfig, dtype: torch.dtype) -> tuple[nn.Module, Decode]:
    if isinstance(config, KVAEConfig):
        kvae = KVAE(config).to(dtype).eval()
        target = native_space(config)
        widths = (a.channels * n**2 for a, n in zip((SPACE, target), grid_ratios(SPACE, target), strict=True))
        adapter = LatentAdapter(Affine(*widths), SPACE, target).requires_grad_(False)
        return kvae, kvae_decoder(HybridVAE(kvae, decode_adapter=adapter))
    from diffusers import AutoencoderKLHunyuanVideo15

    vae: Any = AutoencoderKLHunyuanVideo15.from_config(json.loads(config)).to(dtype).eval()
    return vae, hunyuan_decoder(vae)


def _embedder(config: Mapping[str, Any], dtype: torch.dtype) -> Embedder:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    model: Any = DINOv3ViTModel(DINOv3ViTConfig(**config))
    backbone = Backbone(model.to(dtype), "", "")
    return Embedder(backbone, Head((backbone.width, backbone.width)))


def _bytes(module: nn.Module, trained: bool = False) -> int:
    """Of the frozen weights, or of those that are trained."""
    return sum(each.nbytes for each in module.parameters() if each.requires_grad == trained)
