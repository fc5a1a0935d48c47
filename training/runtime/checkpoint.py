"""The state of a training run in a safetensors file: nothing here is ever unpickled, and what is read is checked.

All that is read is copied: tensors that are views of the file would keep it mapped, and Windows replaces no such file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...adapters.networks import Network
from ...kvae.files import Weights, WeightsError, save_weights
from ...kvae.foreign import build, parse_object
from ..errors import UserError


@dataclass
class State:
    """All that a resumed run needs: the networks, their averages, the optimisers, the best so far, and where we are."""

    networks: dict[str, Network]
    averages: dict[str, dict[str, Tensor]]
    best: dict[str, dict[str, Tensor]]
    best_mse: dict[str, float]
    optimisers: list[Optimizer]
    step: int = 0
    epoch: int = 0  # finished, validation included
    sums: tuple[float, float, int] = (0.0, 0.0, 0)  # of the running epoch: squared errors both ways, clips
    rows: int = 0  # logged

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of networks, averages and best, by the names that they have in the file."""
        kinds = {name: {"live": network.state_dict()} for name, network in self.networks.items()}
        for name, each in kinds.items():
            each |= {"average": self.averages[name], "best": self.best[name]}
        return {
            f"{kind}.{name}.{key}": tensor
            for name, each in kinds.items()
            for kind, weights in each.items()
            for key, tensor in weights.items()
        }


@dataclass(frozen=True)
class Progress:
    """Where a saved run was."""

    step: int
    epoch: int
    sums: tuple[float, ...]
    best_mse: dict[str, float]
    rows: int


def save_state(path: Path, state: State, config: Any, pairs: Mapping[str, Any]) -> None:
    """Write the state of a run.

    Args:
        pairs: which pairs it is of; it goes on with these only.
    """
    tensors = state.tensors()
    for i, optimiser in enumerate(state.optimisers):
        tensors |= optimiser_tensors(f"optimiser{i}", optimiser)
    progress = Progress(state.step, state.epoch, state.sums, state.best_mse, state.rows)
    about = {"config": asdict(config), "pairs": pairs, "progress": asdict(progress)}
    save_weights(path, tensors, {key: json.dumps(value) for key, value in about.items()})


def load_state(path: Path, state: State, config: Any, pairs: Mapping[str, Any], steps: int) -> bool:
    """Fill the state of a run with these settings and pairs from its file; whether there is one.

    Args:
        steps: of an epoch.

    Raises:
        UserError: the file is damaged, or belongs to another run.
    """
    saved = open_state(path, config, pairs)
    if saved is None:
        return False
    with _not_a_state(path):
        progress = build(Progress, parse_object(saved.metadata["progress"]))
        in_epoch = progress.step - progress.epoch * steps
        if not (0 <= in_epoch <= steps and progress.epoch >= 0 and progress.rows >= 0 and len(progress.sums) == 3):
            raise ValueError(f"{progress}")
        if set(progress.best_mse) != set(state.best_mse):
            raise ValueError(f"it is of {', '.join(progress.best_mse)}")
        for key, tensor in state.tensors().items():
            if saved.shapes.get(key) != tuple(tensor.shape):
                raise ValueError(f"{key} is {saved.shapes.get(key)}; expected {tuple(tensor.shape)}")
            tensor.copy_(saved[key])  # into the networks' own
        for i, optimiser in enumerate(state.optimisers):
            restore_optimiser(f"optimiser{i}", optimiser, saved)
    state.step, state.epoch, state.rows = progress.step, progress.epoch, progress.rows
    state.sums = (progress.sums[0], progress.sums[1], int(progress.sums[2]))
    state.best_mse = dict(progress.best_mse)
    return True


def open_state(path: Path, config: Any, pairs: Mapping[str, Any] | None = None) -> Weights | None:
    """The saved state of a run with these settings and pairs; None where there is none. Where it runs may change.

    Raises:
        UserError: the file is damaged, or belongs to a run with other settings, or on other pairs.
    """
    if not path.exists():
        return None
    with _not_a_state(path):
        saved = Weights(path)
        theirs = parse_object(saved.metadata["config"])
        their_pairs = parse_object(saved.metadata["pairs"]) if pairs is not None else {}
    for key, ours in asdict(config).items():
        if key not in ("device", "threads") and theirs.get(key) != ours:
            raise UserError(
                f"{path}: an unfinished run had {key} = {theirs.get(key)!r}, now {ours!r}; "
                "delete the file to start anew, or use the old settings to go on"
            )
    _check_pairs(path, their_pairs, pairs or {})
    return saved


def _check_pairs(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Other pairs are another order and another number of steps: there is nothing to go on with."""
    for name in ours:
        if theirs.get(name) == ours[name]:
            continue
        counts = [each.get("pairs") if isinstance(each, dict) else None for each in (theirs.get(name), ours[name])]
        what = f"{counts[0]} {name}, now {counts[1]}" if counts[0] != counts[1] else f"other {name} than there are now"
        raise UserError(
            f"{path}: an unfinished run had {what}; delete the file to start anew, or bring the old pairs back to go on"
        )


def optimiser_tensors(prefix: str, optimiser: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps for its i-th parameter, as `prefix.i.name`."""
    return {
        f"{prefix}.{i}.{name}": value.clone()
        for i, parameter in enumerate(_parameters(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def restore_optimiser(prefix: str, optimiser: Optimizer, saved: Weights) -> None:
    """The inverse of `optimiser_tensors`.

    Raises:
        UserError: what was saved is not of this optimiser.
    """
    parameters = list(_parameters(optimiser))
    with _not_a_state(saved.path):
        for key in saved.shapes:
            if not key.startswith(prefix + "."):
                continue
            i, name = key.removeprefix(prefix + ".").split(".")
            parameter = parameters[int(i)]
            # step counters stay on the CPU, moments live beside the parameter
            expected = () if name == "step" else tuple(parameter.shape)
            if saved.shapes[key] != expected:
                raise ValueError(f"{key} is {saved.shapes[key]}; expected {expected}")
            device = torch.device("cpu") if name == "step" else parameter.device
            optimiser.state[parameter][name] = saved[key].to(device, torch.float32, copy=True)


def _parameters(optimiser: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimiser.param_groups for parameter in group["params"])


@contextmanager
def _not_a_state(path: Path) -> Iterator[None]:
    """Turn what a foreign or damaged file leads to into one line."""
    try:
        yield
    except (WeightsError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the state of a training run ({error}); delete it to start anew") from None
