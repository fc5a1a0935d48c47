"""The two losses of a LoRA without videos, and their gradient, one step of the path at a time.

    L_distill = mean over the kept steps of mean((v_student − v_teacher)²)
    L = L_distill + λ L_id(x̂0),  x̂0 = x − σ v_student at the deep step

`learn` holds the graph of the network for one step only, and never together with that of the decoder: the identity loss
is first computed by itself, and its gradient by x̂0 is then given to the flow of the deep step.

# x_Bcthw, v_Bcthw, z_Bcthw scaled latents, their flow, and clips without noise
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .path import Kept, clean

Student = Callable[[Tensor, int], Tensor]  # x_Bcthw and the index of a step → v_Bcthw
IdentityLoss = Callable[[Tensor, Tensor], Tensor]  # z_Bcthw of student and teacher → a number; by the first, a gradient


@dataclass(frozen=True)
class Losses:
    """What a sample cost; nan for an identity loss that was not asked for.

    Attributes:
        flow: mean v_teacher², by which `distill` can be judged.
    """

    distill: float
    identity: float
    flow: float


def identity_weight(step: int, base: float, schedule: str, warmup: int) -> float:
    """λ of an optimiser step: "constant", or "linear" or "cosine", which reach `base` after `warmup` steps."""
    done = min(1.0, step / warmup) if warmup else 1.0
    share = {"constant": 1.0, "linear": done, "cosine": 0.5 * (1 - math.cos(math.pi * done))}[schedule]
    return base * share


def learn(
    student: Student,
    kept: Sequence[Kept],
    sigma: Tensor,
    deep: int = -1,
    identity: IdentityLoss | None = None,
    weight: float = 0.0,
    share: float = 1.0,
) -> Losses:
    """Add the gradient of L to the student's parameters.

    Args:
        kept: steps of the teacher's path, the deep one among them if there is an identity loss.
        deep: the index of the deep step.
        weight: λ.
        share: of this sample in the optimiser's step: 1 / (samples of all processes).
    """
    found, push = torch.tensor(math.nan), None
    if identity is not None:
        found, push = _identity_gradient(student, next(each for each in kept if each.index == deep), sigma, identity)
    errors = []
    for each in kept:
        v = student(each.x, each.index).float()
        error = (v - each.v).square().mean()
        objective = error / len(kept)
        if push is not None and each.index == deep:
            objective = objective + weight * (v * push).sum()
        (share * objective).backward()
        errors.append(error.detach())
    flow = torch.stack([each.v.square().mean() for each in kept]).mean()
    return Losses(torch.stack(errors).mean().item(), found.item(), flow.item())


def _identity_gradient(student: Student, at: Kept, sigma: Tensor, identity: IdentityLoss) -> tuple[Tensor, Tensor]:
    """L_id, and its gradient by the flow at a step. Nothing of either graph is left."""
    level = sigma[at.index]
    with torch.no_grad():
        z, of_teacher = (clean(at.x, v, level) for v in (student(at.x, at.index), at.v))
    with torch.enable_grad():
        loss = identity(z.requires_grad_(), of_teacher)
        (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), -level * gradient
