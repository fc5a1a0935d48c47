"""The state of a training: models, moving averages, optimisers and the step, saved to a file and resumed from it.

    trainer = Trainer({"vae": vae}, optimisers, Schedule(lr=1e-3, total_steps=1000), ema=0.99, progress=Progress())
    trainer.resume(path, config)
    while trainer.step < 1000:
        loss(vae).backward()
        trainer.update()
    with trainer.averaged():
        validate(vae)
    trainer.save(path, config)

The file is safetensors, so reading it runs no code. Everything read is checked, and copied: a tensor that is a view of
the file would keep the file mapped, and Windows cannot replace a mapped file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...kvae.errors import WeightsError
from ...kvae.files import Weights, save_weights
from ...kvae.foreign import build, parse_object
from ..errors import UserError

P = TypeVar("P")  # a dataclass of JSON values
MODEL = TypeVar("MODEL", bound=nn.Module)
MAY_CHANGE = ("device", "threads")  # settings that a resumed training may change


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: a linear warm-up, multiplied by a linear decay to zero.

    Attributes:
        lr: the rate that both factors are applied to.
        total_steps: of the whole training.
        warmup_steps: 1 for no warm-up.
        decays: False for no decay.
    """

    lr: float
    total_steps: int
    warmup_steps: int = 1
    decays: bool = True

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.warm(step) * (1 - step / self.total_steps if self.decays else 1)

    def warm(self, step: int) -> float:
        """The rate before its decay."""
        return self.lr * min(1, (step + 1) / self.warmup_steps)


class Trainer(Generic[MODEL, P]):
    """The state of a training, and its step.

    Attributes:
        models: by name.
        averages: exponential moving averages of the models' state dicts, by the models' names; without `ema`, these
            are the models' own tensors.
        optimisers: of the models' parameters.
        step: number of steps done.
        progress: what this training counts in addition; a dataclass of JSON values, saved and resumed with the rest.
        extra: more tensors to save and resume, by prefix and key.

    Args:
        ema: decay of the moving averages; smaller in the first steps, when there is little to average.
    """

    def __init__(
        self, models: dict[str, MODEL], optimisers: Sequence[Optimizer], schedule: Schedule, ema: float, progress: P
    ):
        self.models, self.optimisers, self.schedule, self.ema = models, list(optimisers), schedule, ema
        self.averages = {name: copied(each) if ema else each for name, each in self._weights().items()}
        self.step, self.progress = 0, progress
        self.extra: dict[str, dict[str, Tensor]] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all models, in one fixed order."""
        return [parameter for model in self.models.values() for parameter in model.parameters()]

    def update(self) -> None:
        """Take an optimiser step with the present gradients, clear them, and move the averages."""
        rate = self.schedule.rate(self.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(self.ema, self.step / (self.step + 10))
        for name, weights in self._weights().items() if self.ema else ():
            for key, tensor in weights.items():
                self.averages[name][key].lerp_(tensor, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the models their averaged weights until the context ends."""
        live = {name: copied(model.state_dict()) for name, model in self.models.items()}
        for name, model in self.models.items():
            model.load_state_dict(self.averages[name])
        try:
            yield
        finally:
            for name, model in self.models.items():
                model.load_state_dict(live[name])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of models, averages and `extra`, not copied, by their keys in the state file."""
        groups = {f"live.{name}": weights for name, weights in self._weights().items()}
        groups |= {f"average.{name}": weights for name, weights in self.averages.items() if self.ema}
        groups |= self.extra
        return {f"{prefix}.{key}": tensor for prefix, group in groups.items() for key, tensor in group.items()}

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: model.state_dict() for name, model in self.models.items()}

    def save(self, path: Path, config: Any, data: Mapping[str, Any] | None = None) -> None:
        """Write the state file.

        Args:
            config: settings of the command, a dataclass; it resumes only with the same settings, except MAY_CHANGE.
            data: identity of what it trains on, by name; it resumes only on the same data.

        Raises:
            WeightsError: the file cannot be written.
        """
        tensors = self.tensors()
        for i, optimiser in enumerate(self.optimisers):
            tensors |= _optimiser_tensors(f"optimiser{i}", optimiser)
        about = {"config": asdict(config)}
        if data is not None:
            about["pairs"] = dict(data)
        about["progress"] = {"step": self.step, **asdict(self.progress)}  # type: ignore[call-overload]
        save_weights(path, tensors, {key: json.dumps(value) for key, value in about.items()})

    def resume(self, path: Path, config: Any, data: Mapping[str, Any] | None = None) -> bool:
        """Restore the state from its file, if there is one; return whether there was.

        Raises:
            UserError: the file is damaged, or belongs to a training with other settings or on other data.
        """
        saved = open_state(path, config, data)
        if saved is None:
            return False
        with state_errors(path):
            values = parse_object(saved.metadata["progress"])
            step = values.pop("step")
            if type(step) is not int or not 0 <= step <= self.schedule.total_steps:
                raise ValueError(f"step {step} of {self.schedule.total_steps}")
            missing = {each.name for each in fields(self.progress)} - values.keys()  # type: ignore[arg-type]
            if missing:
                raise ValueError(f"no {', '.join(sorted(missing))} in its progress")
            progress = build(type(self.progress), values)
            for key, tensor in self.tensors().items():
                if saved.shapes.get(key) != tuple(tensor.shape):
                    raise ValueError(f"{key} is {saved.shapes.get(key)}; expected {tuple(tensor.shape)}")
                tensor.copy_(saved[key])
            for i, optimiser in enumerate(self.optimisers):
                _restore_optimiser(f"optimiser{i}", optimiser, saved)
                if step and not optimiser.state:  # it would go on without its momentum, and nobody would know
                    raise ValueError(f"no state of its optimiser after step {step}")
        self.step, self.progress = step, progress
        return True


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict and its tensors."""
    return {key: tensor.clone() for key, tensor in weights.items()}


def open_state(path: Path, config: Any, data: Mapping[str, Any] | None = None) -> Weights | None:
    """Open the state file of a training with these settings and data; None if there is no file.

    Raises:
        UserError: the file is damaged, or belongs to a training with other settings or on other data.
    """
    if not path.exists():
        return None
    with state_errors(path):
        saved = Weights(path)
        theirs = parse_object(saved.metadata["config"])
        their_data = parse_object(saved.metadata["pairs"]) if data is not None else {}
    for key, ours in asdict(config).items():
        if key not in MAY_CHANGE and theirs.get(key) != ours:
            raise UserError(
                f"{path}: an unfinished run had {key} = {theirs.get(key)!r}, now {ours!r}; "
                "delete the file to start anew, or use the old settings to go on"
            )
    for name, value in (data or {}).items():
        _check_same_data(path, name, their_data.get(name), value)
    return saved


def _check_same_data(path: Path, name: str, theirs: Any, ours: Any) -> None:
    """Raise UserError if the data differ: other pairs have another order and another number of steps."""
    if theirs == ours:
        return
    before, now = (each.get("pairs") if isinstance(each, dict) else None for each in (theirs, ours))
    what = f"{before} {name}, now {now}" if before != now else f"other {name} than there are now"
    raise UserError(
        f"{path}: an unfinished run had {what}; delete the file to start anew, or bring the old pairs back to go on"
    )


@contextmanager
def state_errors(path: Path) -> Iterator[None]:
    """Turn errors that a damaged or foreign state file causes into a UserError."""
    try:
        yield
    except (WeightsError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the state of a training run ({error}); delete it to start anew") from None


def _optimiser_tensors(prefix: str, optimiser: Optimizer) -> dict[str, Tensor]:
    """The state of the optimiser's i-th parameter, as `prefix.i.name`."""
    return {
        f"{prefix}.{i}.{name}": value.clone()
        for i, parameter in enumerate(_parameters(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def _restore_optimiser(prefix: str, optimiser: Optimizer, saved: Weights) -> None:
    """The inverse of `_optimiser_tensors`.

    Raises:
        ValueError, IndexError: the saved tensors do not belong to this optimiser.
    """
    parameters = list(_parameters(optimiser))
    for key in saved.shapes:
        if not key.startswith(prefix + "."):
            continue
        i, name = key.removeprefix(prefix + ".").split(".")
        parameter = parameters[int(i)]
        # step counters stay on the CPU, moments are on the parameter's device
        expected = () if name == "step" else tuple(parameter.shape)
        if saved.shapes[key] != expected:
            raise ValueError(f"{key} is {saved.shapes[key]}; expected {expected}")
        device = torch.device("cpu") if name == "step" else parameter.device
        optimiser.state[parameter][name] = saved[key].to(device, torch.float32, copy=True)


def _parameters(optimiser: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimiser.param_groups for parameter in group["params"])
