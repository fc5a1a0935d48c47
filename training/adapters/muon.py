"""Muon: momentum whose update is the nearest semi-orthogonal matrix (https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

RMS = 0.2  # of an update, in units of lr, as AdamW's usually is (https://arxiv.org/abs/2502.16982)


def orthogonalise(g_MN: Tensor) -> Tensor:
    """[M, N] → approximately the nearest matrix whose singular values are all 1, by five Newton-Schulz steps."""
    wide = g_MN.shape[0] <= g_MN.shape[1]
    x = (g_MN if wide else g_MN.T) / (g_MN.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x  # the post's coefficients
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, as matrices [out, all else]; torch.optim.Muon accepts only two.

    Args:
        weight_decay: each step takes lr · weight_decay of a weight away, whatever its gradient.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * RMS * math.sqrt(max(update.shape)))
