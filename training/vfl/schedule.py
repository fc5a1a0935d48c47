"""The learning rate of the trainings for a Video-Free LoRA: a linear warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..runtime.trainer import Schedule


@dataclass(frozen=True)
class Cosine(Schedule):
    """The rate of each optimiser step. That of the first is above zero, and that of the step after the last is zero."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        done = max(0, step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.warm(step) * 0.5 * (1 + math.cos(math.pi * done))
