"""One sample's part of an optimiser's step: the teacher's way from noise, then the gradient of both losses.

    recipe = Recipe(sigmas(25, shift=5), Steps(), band=(14, 20), weight=0.15)
    velocity = lambda x, i: flow(transformer, given, x, recipe.sigma[i])
    lora_step(transformer, velocity, noise(seed, k, shape), recipe, seed, k, step, identity=identity)
    optimiser.step()

It knows no files, no pipeline and no pictures: any network to which `add_lora` gave a LoRA will do.

# x_Bcthw scaled latents, v_Bcthw their flow; N steps of a path, i index of one; k number of a sample
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .draws import Draws
from .lora import base_of
from .losses import IdentityLoss, Losses, identity_weight, learn
from .path import Drawn, Steps, Teacher, rollout

Velocity = Callable[[Tensor, int], Tensor]  # x_Bcthw and the index of a step → v_Bcthw, of the network as it is then


@dataclass(frozen=True)
class Recipe:
    """What a LoRA learns from, whatever the network, the pictures and the decoder.

    Attributes:
        sigma: noise levels [N + 1] of the path, from `sigmas`.
        law: by which the steps of a path are drawn.
        band: the first and the last index of the deep step, from `band_of` or `band_of_sigma`.
        weight: λ of the identity loss once it is warm; 0 turns the loss off.
        schedule: "constant", "linear" or "cosine": how λ gets there (`identity_weight`).
        warmup: the optimiser's steps that this takes.
        every: the identity loss is on in each of so many of the optimiser's steps.
    """

    sigma: Tensor
    law: Steps = field(default_factory=Steps)
    band: tuple[int, int] = (14, 20)
    weight: float = 0.15
    schedule: str = "linear"
    warmup: int = 500
    every: int = 1

    def looks(self, step: int) -> bool:
        """Whether the identity loss is on in the optimiser's step, counted from 0."""
        return self.weight > 0 and step % self.every == 0

    def drawn(self, seed: int, k: int, step: int) -> Drawn:
        """The steps of the path of sample k, a pure function of the arguments."""
        return self.law.draw(Draws(seed, "steps", k), len(self.sigma) - 1, self.band, self.looks(step))


def lora_step(
    network: Any,
    velocity: Velocity,
    x_Bcthw: Tensor,
    recipe: Recipe,
    seed: int,
    k: int,
    step: int,
    identity: IdentityLoss | None = None,
    teacher: Teacher | None = None,
    share: float = 1.0,
    partners: Sequence[Drawn] = (),
) -> Losses:
    """Add the gradient of one sample's losses to the LoRA's parameters. The caller clips it and steps the optimiser.

    With the LoRA off, the teacher goes from noise to the last step that was drawn; with the LoRA on, the student learns
    from the steps kept on the way, with one graph of the network at a time and never beside the decoder's.

    Args:
        network: has a LoRA, by `add_lora`.
        velocity: its flow, differentiable; called with the LoRA off for the teacher and on for the student.
        x_Bcthw: noise, float32, from `noise(seed, k, shape)`.
        seed: of the run; with k, of the steps that are drawn.
        k: number of the sample in the run.
        step: of the optimiser, counted from 0; λ and whether the identity loss is on depend on it.
        identity: z_Bcthw of student and teacher → a number, differentiable by the first. Needed where
            `recipe.looks(step)`.
        teacher: x and index → the flow that is kept, and the one that the path follows, for guidance. Without it
            both are `velocity`.
        share: of this sample in the optimiser's step, 1 / (samples of all processes).
        partners: `recipe.drawn` of the samples that other processes take meanwhile, where these hold parts of one base:
            then each pass is one of all processes, so all take as many as the one that needs most.

    Returns:
        The losses of the sample. `distill / flow` is to stay below 0.002.
    """
    drawn = recipe.drawn(seed, k, step)
    teacher = teacher or (lambda x, i: (velocity(x, i),) * 2)
    with base_of(network):
        kept = rollout(teacher, x_Bcthw, recipe.sigma, drawn.indices)
        for _ in range(drawn.indices[-1], max((each.indices[-1] for each in partners), default=0)):
            with torch.no_grad():
                teacher(x_Bcthw, 0)
    # the first optimiser's step has λ > 0, as its learning rate has
    weight = identity_weight(step + 1, recipe.weight, recipe.schedule, recipe.warmup)
    wanted = identity if recipe.looks(step) else None
    losses = learn(velocity, kept, recipe.sigma, drawn.deep, wanted, weight, share)
    for _ in range(len(drawn.indices), max((len(each.indices) for each in partners), default=0)):
        (0 * velocity(x_Bcthw, 0).sum()).backward()
    return losses
