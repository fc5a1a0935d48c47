"""The state of a training run in a safetensors file: nothing here is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..kvae.files import Weights, WeightsError
from .errors import UserError


def open_state(path: Path, config: Any) -> Weights | None:
    """The saved state of a run with these settings; None where there is none. Where it runs may change.

    Raises:
        UserError: the file is damaged, or belongs to a run with other settings.
    """
    if not path.exists():
        return None
    try:
        saved = Weights(path)
        theirs = json.loads(saved.metadata["config"])
    except (WeightsError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not the state of a training run ({error}); delete it to start anew") from None
    for key, ours in asdict(config).items():
        if key not in ("device", "threads") and theirs.get(key) != ours:
            raise UserError(
                f"{path}: an unfinished run had {key} = {theirs.get(key)!r}, now {ours!r}; "
                "delete the file to start anew, or use the old settings to go on"
            )
    return saved


def optimiser_tensors(prefix: str, optimiser: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps for its i-th parameter, as `prefix.i.name`."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return {
        f"{prefix}.{i}.{name}": value.clone()
        for i, parameter in enumerate(parameters)
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def restore_optimiser(prefix: str, optimiser: Optimizer, saved: Weights) -> None:
    """The inverse of `optimiser_tensors`."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for key in saved.shapes:
        if key.startswith(prefix + "."):
            i, name = key.removeprefix(prefix + ".").split(".")
            parameter = parameters[int(i)]
            # step counters stay on the CPU, moments live beside the parameter
            value = saved[key] if name == "step" else saved[key].to(parameter.device)
            optimiser.state[parameter][name] = value
