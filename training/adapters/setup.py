"""Set up a training: pairs, closed form, networks. What cannot be trained is refused here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

import torch

from ...adapters.networks import Network
from ..data.dataset import Groups
from ..directions import DIRECTIONS
from ..errors import UserError
from ..runtime.processes import Processes
from ..runtime.trainer import Trainer, copied, open_state
from .closed_form import fit_both_ways
from .config import OutputFiles, TrainConfig, output_files
from .recipe import Recipe, crop_radius
from .ridge import Ridge
from .training_pairs import TrainingPairs, check_variance, open_training_pairs


@dataclass
class Progress:
    """What a training counts in addition to its steps. The fields are the names in the state file."""

    epoch: int = 0  # finished, validation included
    sums: tuple[float, ...] = (0.0, 0.0, 0)  # over the running epoch: squared errors H→K and K→H, clips
    best_mse: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS, math.inf))
    rows: int = 0  # of the log

    def check(self, step: int, steps_per_epoch: int) -> None:
        """Raise ValueError unless a training can have this progress after `step` steps."""
        in_epoch = step - self.epoch * steps_per_epoch
        if not (0 <= in_epoch <= steps_per_epoch and self.epoch >= 0 and self.rows >= 0 and len(self.sums) == 3):
            raise ValueError(f"{asdict(self)} at step {step}")
        if self.best_mse.keys() != DIRECTIONS.keys():
            raise ValueError(f"its best_mse is of {', '.join(self.best_mse)}")


@dataclass(frozen=True)
class Training:
    """A training: its trainer, which changes with every step, and everything that stays the same."""

    config: TrainConfig
    recipe: Recipe
    processes: Processes
    files: OutputFiles
    pairs: TrainingPairs
    fits: dict[str, Ridge]  # closed form, by direction
    radius: int | None  # of the crops' halo; None for whole clips
    groups: Groups  # the pairs that can share a batch
    steps_per_epoch: int
    trainer: Trainer[Network, Progress]  # with the best averaged weights so far as extra "best.h2k" and "best.k2h"


def set_up(config: TrainConfig, recipe: Recipe) -> Training:
    """Open the pairs, fit the closed form, and build the networks.

    Raises:
        UserError: an option is out of range, the pairs cannot be trained on, the state of an unfinished training does
            not fit, or the processes see different pairs.
    """
    files = output_files(config)
    processes = Processes(config.device)
    config = replace(config, device=str(processes.device))
    pairs = open_training_pairs(config)
    if any(theirs != pairs.identity for theirs in processes.gather(pairs.identity)):
        raise UserError(f"{config.latent_root}: the processes do not see the same pairs")
    open_state(files.state, config, pairs.identity)  # refused, if at all, before the closed form is computed

    fits = fit_both_ways(pairs.train, config.device, processes=processes)
    check_variance(config.latent_root, fits)
    torch.manual_seed(config.seed)
    try:
        networks = recipe.networks(config.network, fits)
    except ValueError as error:
        raise UserError(f"{config.latent_root}: {error}") from None
    for network in networks.values():
        network.to(config.device)

    radius = crop_radius(networks)
    groups = pairs.train.groups(radius)
    steps = sum(math.ceil(len(group) / config.batch_size) for group in groups.values())
    optimisers = recipe.optimisers(networks, config.lr, config.weight_decay)
    schedule = recipe.schedule(config.lr, steps * config.epochs)
    trainer = Trainer(networks, optimisers, schedule, config.ema, Progress())
    trainer.extra = {f"best.{name}": copied(network.state_dict()) for name, network in networks.items()}
    return Training(config, recipe, processes, files, pairs, fits, radius, groups, steps, trainer)
