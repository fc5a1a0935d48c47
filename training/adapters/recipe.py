"""How adapters are trained: networks and their start, crops, loss, optimisers, learning rate, moving average.

# z_h HunyuanVideo's latents, z_k KVAE's, [B, c, t, h, w] float32; weight as data.crops.crop_weights, [B, 1, t, h, w]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ...adapters.networks import Affine, Network, PointwiseNet, Residual, build_network
from ..directions import DIRECTIONS
from ..runtime.trainer import Schedule
from .muon import Muon
from .ridge import Ridge

Networks = dict[str, Network]  # by direction, "h2k" and "k2h"
Errors = dict[str, Tensor]  # scalars

# defaults of the options --lr, --weight-decay and --ema
LR = 3e-3  # of Muon and AdamW
WEIGHT_DECAY = 1e-4  # of AdamW
EMA = 0.99  # decay of the moving average; the averaged weights are validated and saved
CHANGE = {2: 1.0, 3: 0.5, 4: 0.5}  # weights of the change along t, h and w in the loss


def latent_errors(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
    """Squared errors of both adapters, "h2k" and "k2h"."""
    errors = {}
    for name, direction in DIRECTIONS.items():
        source, target = direction.ordered(z_h, z_k)
        errors[name] = latent_error(networks[name](source), target, weight)
    return errors


def latent_error(found: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error over the positions that count, averaged over the crops."""
    return ((found.float() - target).square().mean(1, keepdim=True) * weight).sum() / len(weight)


def with_change(
    networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, axes: Mapping[int, float] = CHANGE
) -> Errors:
    """Squared errors of the latents, and of the change from each latent to the next along an axis.

    The change makes detail and motion count for more; without it, blur is cheap.

    Args:
        axes: weight of the squared error of the change, by axis.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, direction in DIRECTIONS.items():
        source, target = direction.ordered(z_h, z_k)
        found[name] = networks[name](source), target
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
    """A way to train both adapters. The defaults are what `train` does; benchmarks/adapters.py measures each of them.

    Attributes:
        network: settings of the network that differ from its defaults.
        closed_form: start at the affine map in closed form.
        muon: Muon for the convolutions of the residual branch, instead of AdamW.
        loss: returns the terms of the loss, which is their sum; "h2k" and "k2h" are printed and logged.
        warmup_steps: steps in which the learning rate rises linearly; 1 for no warm-up.
        decays: the learning rate falls linearly to zero.
    """

    network: dict[str, int] = field(default_factory=dict)
    closed_form: bool = True
    muon: bool = True
    loss: Callable[[Networks, Tensor, Tensor, Tensor], Errors] = with_change
    warmup_steps: int = 20
    decays: bool = True

    def networks(self, name: str, fits: dict[str, Ridge]) -> Networks:
        """Both networks as training starts.

        The default network is an affine map and a residual branch whose last layer is zero, so it starts as good as the
        closed form.

        Args:
            name: of the network, see NETWORKS.
            fits: the closed-form fits of the training pairs, by direction.

        Raises:
            ValueError: there are too few pairs for the closed form.
        """
        return {key: self._network(name, fits[key], fits[each.opposite]) for key, each in DIRECTIONS.items()}

    def _network(self, name: str, fit: Ridge, back: Ridge) -> Network:
        """The network of one direction; `back`, the fit of the other direction, knows the source's statistics."""
        network = build_network(name, in_channels=fit.in_channels, out_channels=fit.out_channels, **self.network)
        if isinstance(network, Affine | Residual) and self.closed_form:
            network.affine.load_state_dict(fit.solve().affine.state_dict())
        if isinstance(network, Residual):
            mean, std = back.target_statistics()
            network.source_mean.copy_(mean)
            network.source_std.copy_(std)
            network.target_std.copy_(fit.target_statistics()[1])
        return network

    def optimisers(self, networks: Networks, lr: float, weight_decay: float) -> list[Optimizer]:
        """Muon for the convolutions of residual branches; AdamW for all else, the affine maps included."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for network in networks.values():
            for key, p in network.named_parameters():
                of_branch = isinstance(network, Residual) and p.ndim == 5 and not key.startswith("affine.")
                (matrices if self.muon and of_branch else rest).append(p)
        adamw = AdamW(rest, lr, weight_decay=weight_decay)
        return [Muon(matrices, lr), adamw] if matrices else [adamw]

    def schedule(self, lr: float, total_steps: int) -> Schedule:
        """The learning rate over the training."""
        return Schedule(lr, total_steps, self.warmup_steps, self.decays)


DEFAULT = Recipe()
# of the published adapters: random 1x1x1 networks that see whole clips, AdamW, a constant rate
PUBLISHED = Recipe(closed_form=False, muon=False, loss=latent_errors, warmup_steps=1, decays=False)


def recipe_of(network: str) -> Recipe:
    """The recipe for a network: the published network is trained as it was published."""
    return PUBLISHED if network == "published" else DEFAULT


def crop_radius(networks: Networks) -> int | None:
    """Radius of the receptive field, which crops must have as a halo; None if a network must see whole clips.

    The part of a crop inside the halo is at most data.crops.COUNTED.
    """
    if any(isinstance(network, PointwiseNet) for network in networks.values()):
        return None
    return max(network.radius for network in networks.values())
