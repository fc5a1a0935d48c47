"""Train a LoRA on the toy's base as a row says, by the product's own step, losses, LoRA and optimiser.

    network = base_network(work)
    share = train_lora(network, embedder(work, row.noise, row.backbone_noise), row, seed=0)

# B = 6 stills in a step
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kvae_comfyui.benchmarks.toy.base import SHIFT
from kvae_comfyui.benchmarks.toy.judge import STEPS
from kvae_comfyui.benchmarks.toy.masks import mask_of
from kvae_comfyui.benchmarks.toy.rows import Row
from kvae_comfyui.benchmarks.toy.world import FRAMES, NEW, SHAPE, Sprites, conditions, decode, encode, sprites
from kvae_comfyui.training.adapters.muon import Muon
from kvae_comfyui.training.vfl.appearance import appearance_loss, moved
from kvae_comfyui.training.vfl.conditions import Conditions, flow
from kvae_comfyui.training.vfl.decoders import smaller
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.identity import Embedder, draw_frames, identity_loss
from kvae_comfyui.training.vfl.lora import add_lora, fill_gradients, lora_parameters
from kvae_comfyui.training.vfl.path import Steps, band_of, noise, sigmas
from kvae_comfyui.training.vfl.schedule import Cosine
from kvae_comfyui.training.vfl.step import Recipe, lora_step

BATCH = 6
LR, DECAY = 4e-3, 0.01
WARMUP = 0.05  # of the steps, for the rate and for λ, as in the product
BAND = 0.60, 0.85
SECONDARY = 0.1  # of the steps compare with another picture of the same sprites
CLIP = 1.0
LAST = 50  # steps over which the distillation's loss is averaged at the end
RAREST = 10  # pictures of the rarest identity


def train_lora(network: Any, embedder: Embedder, row: Row, seed: int) -> float:
    """Add a LoRA to the base and train it.

    Returns:
        the mean of L_distill / mean v_T² over the last steps; nan for a row that does not distil.
    """
    add_lora(network, "published", row.rank, row.rank, seed)
    parameters = lora_parameters(network)
    optimiser = Muon(parameters.values(), LR, weight_decay=DECAY)
    warmup = max(1, round(WARMUP * row.steps))
    rate = Cosine(LR, row.steps, warmup)
    sigma = scheduler_sigmas() if row.fault == "timesteps" else sigmas(STEPS, SHIFT)
    recipe = Recipe(sigma, Steps(tail=row.tail), band_of(STEPS, *BAND), row.unit, row.schedule, warmup)
    shares = []
    for step in tqdm(range(row.steps), desc=f"seed {seed}", leave=False):
        shown = stills(row, seed, step)
        if row.videos:
            share = video_step(network, shown, sigma, seed, step)
        else:
            share = still_step(network, embedder, row, recipe, shown, seed, step)
        shares.append(share)
        fill_gradients(iter(parameters.values()))
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimiser.param_groups[0]["lr"] = rate.rate(step)
        optimiser.step()
        optimiser.zero_grad()
        if row.fault == "bfloat16":
            round_all(parameters.values())
        if row.fault == "forgets" and step % 25 == 24:
            optimiser.state.clear()
    if row.fault == "scale":
        for name, parameter in parameters.items():
            parameter.data.mul_(2 if name.endswith(".b") else 1)
    return sum(shares[-LAST:]) / len(shares[-LAST:])


def still_step(
    network: Any, embedder: Embedder, row: Row, recipe: Recipe, shown: Sprites, seed: int, step: int
) -> float:
    """The gradient of one step from first frames alone; L_distill / mean v_T² of it."""
    first = shown.clips()[:, :, 0]
    given = conditions(first, shown.step_B2)
    drawn = recipe.drawn(seed, step, step)
    told = dict.fromkeys(drawn.indices, given)
    if row.fault == "interleaved":
        told = interleaved(given, drawn.indices)

    def teacher(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return (flow(network, given, x, recipe.sigma[i]),) * 2

    def student(x: Tensor, i: int) -> Tensor:
        return flow(network, told[i], x, recipe.sigma[i])

    def look(z: Tensor, of_teacher: Tensor) -> Tensor:
        return looked_at(row, embedder, shown, z, of_teacher, seed, step)

    x = noise(seed, step, (BATCH, *SHAPE))
    losses = lora_step(network, student, x, recipe, seed, step, step, look, teacher)
    return losses.distill / losses.flow


def looked_at(
    row: Row, embedder: Embedder, shown: Sprites, z_Bcthw: Tensor, teacher_Bcthw: Tensor, seed: int, step: int
) -> Tensor:
    """What the row looks at in the student's estimate of the clips, in the row's unit."""
    y = decode(smaller(z_Bcthw, scale=row.scale))
    first, loss = shown.clips()[:, :, 0], torch.zeros(())
    if row.weight:
        other = Draws(seed, "secondary", step).unit() < SECONDARY
        picture = shown.elsewhere(Draws(seed, "other", step)).clips()[:, :, 0] if other else first
        frames = draw_frames(Draws(seed, "frames", step), FRAMES, row.frames)
        loss = loss + row.weight / row.unit * identity_loss(embedder, y, frames, embedder(picture))
    if row.appearance:
        target = moved(decode(teacher_Bcthw), first, mask_of(row.mask, shown, embedder.backbone))
        loss = loss + row.appearance / row.unit * appearance_loss(y, target)
    return loss


def video_step(network: Any, shown: Sprites, sigma: Tensor, seed: int, step: int) -> float:
    """The gradient of one step on true clips, by flow matching at a level of the path; there is nothing to distil."""
    y = shown.clips()
    z, start = encode(y), noise(seed, step, (BATCH, *SHAPE))
    level = sigma[Draws(seed, "level", step).below(STEPS)]
    v = flow(network, conditions(y[:, :, 0], shown.step_B2), (1 - level) * z + level * start, level)
    (v - (start - z)).square().mean().backward()
    return math.nan


def stills(row: Row, seed: int, step: int) -> Sprites:
    """The sprites of a step."""
    draws = Draws(seed, "stills", step)
    if row.fault == "anew":  # few pictures of one sprite
        one = sprites(1, NEW, Draws(seed, "rarest"))
        pictures = Sprites(*(torch.cat([part] * RAREST) for part in vars(one).values()))
        pool = pictures.elsewhere(Draws(seed, "its pictures"))
    elif row.stills:
        pool = sprites(row.stills, NEW, Draws(seed, "pool"))
    else:
        return sprites(BATCH, NEW, draws)
    return pool[torch.tensor([i for i, _ in zip(draws.shuffled(len(pool)), range(BATCH), strict=False)])]


def interleaved(given: Conditions, indices: tuple[int, ...]) -> dict[int, Conditions]:
    """Conditions of B samples, repeated one by one for steps that are stacked whole: each step sees other samples'."""
    places = torch.arange(BATCH).repeat_interleave(len(indices)).view(len(indices), BATCH)
    parts = vars(given)
    return {
        i: Conditions(**{name: part[where] for name, part in parts.items()})
        for i, where in zip(indices, places, strict=True)
    }


def scheduler_sigmas() -> Tensor:
    """The levels of diffusers' scheduler if it is asked for a number of steps alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas


@torch.no_grad()
def round_all(parameters: Iterable[Tensor]) -> None:
    """Round to bfloat16, as weights of that dtype are after each step."""
    for parameter in parameters:
        parameter.copy_(parameter.bfloat16())
