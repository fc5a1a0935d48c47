"""The path from noise to a clip: its noise levels, the teacher's way along it, and the steps that the student learns.

    sigma = sigmas(25, shift=5)                                 # 1, 0.99 … 0.17, 0
    steps = Steps(count=2).draw(Draws(seed, "steps", k), 25, band_of(25, 0.60, 0.85))
    kept = rollout(teacher, noise(seed, k, shape), sigma, steps)
    z = clean(kept[0].x, kept[0].v, sigma[kept[0].index])       # the estimate of the clip from one step

# N steps, i index of a step: 0 is pure noise; σ noise level; x_Bcthw, v_Bcthw scaled latents and their flow
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .draws import Draws


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels [N + 1] from 1 to 0, float32, as the image-to-video pipeline asks its scheduler for them.

    The scheduler's own `set_timesteps(N)` gives other levels: its last is 0.024 instead of 0.172 for N = 25, shift 5.
    """
    lin = torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()
    return shift * lin / (1 + (shift - 1) * lin)


def timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """What the network is told of a noise level: 1000 σ, in its dtype as in the pipeline (bfloat16 rounds to 4)."""
    return (sigma * 1000).to(dtype)


def noise(seed: int, k: int, shape: tuple[int, ...]) -> Tensor:
    """The start of the path of sample k: float32 on the CPU, the same whatever the device and the processes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(Draws(seed, "noise", k).bits()))


def euler(x_Bcthw: Tensor, v_Bcthw: Tensor, sigma: Tensor, i: int) -> Tensor:
    """x at step i and its flow → x at step i + 1, in float32."""
    return x_Bcthw.float() + (sigma[i + 1] - sigma[i]) * v_Bcthw.float()


def clean(x_Bcthw: Tensor, v_Bcthw: Tensor, sigma_i: Tensor) -> Tensor:
    """The estimate of the clip from one step, x − σ v, in float32. Exact where the path is a straight line."""
    return x_Bcthw.float() - sigma_i * v_Bcthw.float()


def band_of(steps: int, low: float, high: float) -> tuple[int, int]:
    """The first and the last index of a band that is given as shares of the path, 0 at noise and 1 at its last step."""
    first = int(low * (steps - 1))
    return first, max(first, int(high * (steps - 1)))


def band_of_sigma(sigma: Tensor, low: float, high: float) -> tuple[int, int]:
    """The first and the last index whose noise level is from `low` to `high`.

    Raises:
        UserError: no step has such a level.
    """
    found = [i for i, level in enumerate(sigma[:-1].tolist()) if low <= level <= high]
    if not found:
        near = min(sigma[:-1].tolist(), key=lambda level: abs(level - (low + high) / 2))
        raise UserError(f"no step has a noise level from {low:g} to {high:g}; the nearest is {near:.3f}")
    return found[0], found[-1]


@dataclass(frozen=True)
class Drawn:
    """The steps of one path that the student learns from.

    Attributes:
        indices: where it imitates the teacher, in the order of the path.
        deep: where the identity loss looks at its estimate of the clip.
    """

    indices: tuple[int, ...]
    deep: int


@dataclass(frozen=True)
class Steps:
    """The law by which steps are drawn.

    Attributes:
        count: of indices before the deep one.
        scheme: "bracket" draws each near a fixed share of the first half of the path; "random" anywhere.
        jitter: how far from that share, as a share of the path; at least one step.
        tail: of indices after the deep one. Inference runs there too, and nothing else holds the student to its base.
    """

    count: int = 2
    scheme: str = "bracket"
    jitter: float = 0.05
    tail: int = 1

    def draw(self, draws: Draws, steps: int, band: tuple[int, int], identity: bool = True) -> Drawn:
        """Draw from a path of N steps.

        Args:
            band: the first and the last index of the deep step.
            identity: whether there is an identity loss now. Without it, the deep step is not among the indices.
        """
        deep = band[0] + draws.below(band[1] - band[0] + 1)
        found = {i for i in self._before(draws, steps) if i <= deep}
        found = found | {deep} if identity else found - {deep}
        after = [deep + 1 + i for i in draws.shuffled(steps - deep - 1)][: self.tail]
        return Drawn(tuple(sorted(found.union(after))) or (deep,), deep)

    def _before(self, draws: Draws, steps: int) -> list[int]:
        if self.scheme == "random":
            return [i for i, _ in zip(draws.shuffled(steps), range(self.count), strict=False)]
        shares = [0.5 * m / self.count for m in range(1, self.count + 1)]
        reach = max(1, int(steps * self.jitter))
        drawn = [round(share * (steps - 1)) + draws.below(2 * reach + 1) - reach for share in shares]
        return [min(max(i, 0), steps - 1) for i in drawn]


@dataclass(frozen=True)
class Kept:
    """A step of the teacher's path: where it was, and the flow that it saw there; float32."""

    index: int
    x: Tensor
    v: Tensor


Teacher = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def rollout(teacher: Teacher, x_Bcthw: Tensor, sigma: Tensor, indices: tuple[int, ...]) -> list[Kept]:
    """Follow the teacher from noise to the last of the indices, and keep those steps.

    Args:
        teacher: x and the index of a step → the flow that is kept, and the flow that the path follows. They differ
            with guidance: the student learns the one without it.
        x_Bcthw: noise, float32.
    """
    kept = []
    for i in range(indices[-1] + 1):
        v, along = teacher(x_Bcthw, i)
        if i in indices:
            kept.append(Kept(i, x_Bcthw, v.float()))
        x_Bcthw = euler(x_Bcthw, along, sigma, i)
    return kept
