"""The state of a training: what is kept of the weights, and what a resume must find."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.adapters.muon import Muon
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.runtime import saves
from kvae_comfyui.training.runtime.saves import Saves
from kvae_comfyui.training.runtime.trainer import Schedule, Trainer
from kvae_comfyui.training.vfl.schedule import Cosine


@dataclass
class Config:
    lr: float = 0.1


@dataclass
class Progress:
    seen: int = 0


def trainer(ema: float = 0.0) -> Trainer:
    layer = torch.nn.Linear(3, 2, bias=False)
    return Trainer({"layer": layer}, [Muon(layer.parameters(), 0.1)], Schedule(0.1, 10), ema, Progress())


def take_step(each: Trainer) -> None:
    each.models["layer"](torch.ones(1, 3)).square().sum().backward()
    each.update()


def test_without_a_moving_average_the_weights_are_kept_once(tmp_path):
    each = trainer()
    take_step(each)
    assert each.averages["layer"]["weight"].data_ptr() == each.models["layer"].weight.data_ptr()
    with each.averaged():
        pass
    each.save(tmp_path / "state.safetensors", Config())
    assert set(Weights(tmp_path / "state.safetensors").shapes) == {"live.layer.weight", "optimiser0.0.momentum"}


def test_a_state_without_that_of_its_optimiser_is_refused(tmp_path):
    """PyTorch's own load_state_dict would go on with momenta of zero."""
    path, each = tmp_path / "state.safetensors", trainer(ema=0.9)
    take_step(each)
    each.save(path, Config())
    assert trainer(ema=0.9).resume(path, Config())
    metadata = dict(Weights(path).metadata)
    save_file({key: t for key, t in load_file(path).items() if "optimiser" not in key}, path, metadata)
    with pytest.raises(UserError, match="no state of its optimiser after step 1"):
        trainer(ema=0.9).resume(path, Config())


def test_muons_decay_takes_a_share_of_each_weight():
    layer = torch.nn.Linear(3, 2, bias=False)
    before, optimiser = layer.weight.detach().clone(), Muon(layer.parameters(), 0.1, weight_decay=0.5)
    for _ in range(3):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimiser.step()
    torch.testing.assert_close(layer.weight, before * 0.95**3)


def test_half_a_cosine_after_the_warm_up():
    rates = [Cosine(2.0, 12, 4).rate(step) for step in range(13)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(1.0) and rates[12] == pytest.approx(0)
    assert Schedule(2.0, 12, 4).rate(1) == pytest.approx(1.0 * 11 / 12)


def test_a_training_is_saved_once_a_minute_and_on_ctrl_c(monkeypatch):
    now, saved = [100.0], []
    monkeypatch.setattr(saves, "time", SimpleNamespace(monotonic=lambda: now[0]))
    each = Saves(lambda: saved.append(now[0]))
    for seconds in range(0, 150, 10):
        now[0] = 100.0 + seconds
        each.after(interrupted=False)
    assert saved == [170.0, 240.0]
    with pytest.raises(KeyboardInterrupt):
        each.after(interrupted=True)
    assert saved == [170.0, 240.0, 240.0]
