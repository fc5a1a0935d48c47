"""The base of the toy: a small network of HunyuanVideo 1.5's architecture that learns to move known sprites.

network = base_network(work)        # trained once, then read from there
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kvae_comfyui.benchmarks.toy.world import CHANNELS, GLYPHS, KNOWN, PICTURE, SIDE, TEXT, conditions, encode, sprites
from kvae_comfyui.training.adapters.muon import Muon
from kvae_comfyui.training.runtime.trainer import Schedule, Trainer
from kvae_comfyui.training.vfl.conditions import flow
from kvae_comfyui.training.vfl.draws import Draws

SHIFT = 5.0  # of the noise levels, in training and on the path
SAVE_STEPS = 50


@dataclass(frozen=True)
class BaseConfig:
    """How the base is trained: `lr` of Muon for the matrices of the blocks, and of AdamW for all else."""

    steps: int = 1200
    batch: int = 16
    lr: float = 4e-3
    warmup: int = 50
    heads: int = 4
    head_width: int = 16
    layers: int = 3
    seed: int = 0


@dataclass
class Progress:
    """What is counted besides the steps: the mean loss of late."""

    loss: float = 0.0


def new_network(config: BaseConfig) -> Any:
    """HunyuanVideo15Transformer3DModel with random weights."""
    from diffusers import HunyuanVideo15Transformer3DModel

    side = 2 * (config.head_width // 5)  # of the rotary positions of rows and of columns; what is left is of frames
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network: Any = HunyuanVideo15Transformer3DModel(
            in_channels=2 * CHANNELS + 1,
            out_channels=CHANNELS,
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            num_layers=config.layers,
            num_refiner_layers=1,
            text_embed_dim=TEXT,
            text_embed_2_dim=GLYPHS,
            image_embed_dim=PICTURE,
            rope_axes_dim=(config.head_width - 2 * side, side, side),
            target_size=SIDE,
        )
        nn.init.normal_(network.cond_type_embed.weight, std=0.1)  # diffusers leaves it to the checkpoint
    network.context_embedder_2.requires_grad_(False)  # of what is in quotes: no prompt here has any
    return network


def base_network(work: Path, config: BaseConfig | None = None) -> Any:
    """The trained base, frozen: from its file in `work`, or trained now. An interrupted training goes on."""
    config = config or BaseConfig()
    network, file = new_network(config), work / "base.safetensors"
    matrices = [p for p in network.transformer_blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    optimisers = [Muon(matrices, config.lr), torch.optim.AdamW(others, config.lr, weight_decay=0.0)]
    schedule = Schedule(config.lr, config.steps, config.warmup)
    trainer = Trainer({"network": network}, optimisers, schedule, ema=0, progress=Progress())
    trainer.resume(file, config)
    with tqdm(desc="base", initial=trainer.step, total=config.steps, disable=trainer.step == config.steps) as bar:
        while trainer.step < config.steps:
            loss = base_loss(network, config, trainer.step)
            loss.backward()
            trainer.progress.loss += (loss.item() - trainer.progress.loss) * 0.05
            trainer.update()
            bar.set_postfix(loss=f"{trainer.progress.loss:.4f}")
            bar.update()
            if trainer.step % SAVE_STEPS == 0 or trainer.step == config.steps:
                trainer.save(file, config)
    return network.eval().requires_grad_(False)


def base_loss(network: Any, config: BaseConfig, step: int) -> Tensor:
    """Flow matching on true clips of known sprites, each at a noise level of its own."""
    seen = sprites(config.batch, KNOWN, Draws(config.seed, "base", step))
    y = seen.clips()
    generator = torch.Generator().manual_seed(Draws(config.seed, "base noise", step).bits())
    u = torch.rand(config.batch, generator=generator)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    z, level = encode(y), sigma.view(-1, 1, 1, 1, 1)
    noise = torch.randn(z.shape, generator=generator)
    v = flow(network, conditions(y[:, :, 0], seen.step_B2), (1 - level) * z + level * noise, sigma)
    return (v - (noise - z)).square().mean()
