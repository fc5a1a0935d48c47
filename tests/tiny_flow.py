"""The network of the tiny HunyuanVideo 1.5 on made-up conditions, for tests of the LoRA's training."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.training.vfl.path import sigmas, timestep
from kvae_comfyui.training.vfl.tiny import tiny_pipeline

STEPS, SHIFT = 25, 5.0
SIGMA = sigmas(STEPS, SHIFT)
SHAPE = (32, 3, 2, 2)  # of a clip of 9 frames, 32x32


def tiny_network() -> Any:
    """The network, frozen; every call gives a fresh one of the same weights."""
    return copy.deepcopy(_network())


@cache
def _network() -> Any:
    return tiny_pipeline().transformer.requires_grad_(False)


def conditions(batch: int) -> dict[str, Tensor]:
    """Another picture and another prompt, of another length, for each sample."""
    generator = torch.Generator().manual_seed(3)
    text, glyphs = torch.zeros(batch, 12), torch.zeros(batch, 6)
    for i in range(batch):
        text[i, : 4 + 3 * i], glyphs[i, : 2 * i] = 1, 1

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "picture": torch.cat([random(32, 1, 2, 2), torch.zeros(batch, 32, 2, 2, 2)], dim=2),
        "encoder_hidden_states": random(12, 16),
        "encoder_attention_mask": text,
        "encoder_hidden_states_2": random(6, 24),
        "encoder_attention_mask_2": glyphs,
        "image_embeds": random(4, 20),
    }


def flow(network: Any, given: dict[str, Tensor], x_Bcthw: Tensor, level: Tensor) -> Tensor:
    """The network's flow at noise levels, one for all or one for each sample."""
    picture = given["picture"].to(x_Bcthw.dtype)
    mask = torch.zeros_like(x_Bcthw[:, :1])
    mask[:, :, 0] = 1
    rest = {key: value for key, value in given.items() if key != "picture"}
    times = timestep(level, x_Bcthw.dtype).expand(len(x_Bcthw))
    return network(torch.cat([x_Bcthw, picture, mask], dim=1), timestep=times, return_dict=False, **rest)[0]
