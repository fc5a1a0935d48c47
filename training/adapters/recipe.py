"""What the adapters are trained by: the loss, the optimisers, where the default network starts.

# z_h HunyuanVideo's latents, z_k KVAE's, [B, c, t, h, w]; weight as training.data.crops gives it, [B, 1, t, h, w]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ...adapters.networks import Network, Residual
from .muon import Muon

Networks = dict[str, Network]  # "h2k" and "k2h"
Errors = dict[str, Tensor]  # scalars

CHANGE = {2: 1.0, 3: 0.5, 4: 0.5}  # in time, over rows and columns


def latent_errors(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
    """The squared errors of both adapters, "h2k" and "k2h"."""
    return {
        "h2k": latent_error(networks["h2k"](z_h), z_k, weight),
        "k2h": latent_error(networks["k2h"](z_k), z_h, weight),
    }


def latent_error(found: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of the positions that count, averaged over the crops."""
    return ((found.float() - target).square().mean(1, keepdim=True) * weight).sum() / len(weight)


def with_change(
    networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, axes: Mapping[int, float] = CHANGE
) -> Errors:
    """And the change from each latent to the next must be right: details and motion count for more, or blur is cheap.

    Args:
        axes: those that a change is taken along, with the weight of its squared error.
    """
    found = {"h2k": (networks["h2k"](z_h), z_k), "k2h": (networks["k2h"](z_k), z_h)}
    errors = {name: latent_error(y, target, weight) for name, (y, target) in found.items()}
    for name, (y, target) in found.items():
        for axis, factor in axes.items():
            n = weight.shape[axis] - 1
            both = torch.minimum(weight.narrow(axis, 0, n), weight.narrow(axis, 1, n))
            change = latent_error(y.float().diff(dim=axis), target.diff(dim=axis), both)
            errors[f"{name} axis {axis}"] = factor * change
    return errors


@dataclass(frozen=True)
class Recipe:
    """The defaults are what `train` follows; the bench of the adapters takes them apart.

    Attributes:
        network: settings of the network other than its own.
        closed_form: start at the affine map in closed form.
        muon: for the convolutions of the residual branch.
        loss: its terms are summed; "h2k" and "k2h" are what is told and logged.
    """

    network: dict[str, int] = field(default_factory=dict)
    closed_form: bool = True
    muon: bool = True
    loss: Callable[[Networks, Tensor, Tensor, Tensor], Errors] = with_change

    def optimisers(self, networks: Networks, lr: float, weight_decay: float) -> list[Optimizer]:
        """Muon for the convolutions of residual branches; AdamW for all else, affine maps at their best included."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for network in networks.values():
            for key, p in network.named_parameters():
                of_branch = isinstance(network, Residual) and p.ndim == 5 and not key.startswith("affine.")
                (matrices if self.muon and of_branch else rest).append(p)
        adamw = AdamW(rest, lr, weight_decay=weight_decay)
        return [Muon(matrices, lr), adamw] if matrices else [adamw]


DEFAULT = Recipe()
PUBLISHED = Recipe(closed_form=False, muon=False, loss=latent_errors)  # that of the published adapters
