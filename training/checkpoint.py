"""Optimiser state as plain tensors, so that a training run can be resumed from a safetensors file."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from ..kvae.files import Weights


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
