"""What the adapters are trained by: the loss, the optimisers, where the default network starts.

# z_h HunyuanVideo's latents, z_k KVAE's, [B, c, t, h, w]; weight as training.crops gives it, [B, 1, t, h, w]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..adapters.networks import Network, Residual
from .muon import Muon

Networks = dict[str, Network]  # "h2k" and "k2h"
Errors = dict[str, Tensor]  # scalars


def latent_errors(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
    """Those of both adapters, "h2k" and "k2h"."""
    return {
        "h2k": latent_error(networks["h2k"](z_h), z_k, weight),
        "k2h": latent_error(networks["k2h"](z_k), z_h, weight),
    }


def latent_error(found: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of the positions that count, averaged over the crops."""
    return ((found.float() - target).square().mean(1, keepdim=True) * weight).sum() / len(weight)


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
    loss: Callable[[Networks, Tensor, Tensor, Tensor], Errors] = latent_errors

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
