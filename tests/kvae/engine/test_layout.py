"""Weights lie in memory as their device wants them, and everything else about them stays the same."""

import pytest
import safetensors.torch
import torch

from kvae_comfyui.kvae import Execution, plan_decode
from kvae_comfyui.kvae.engine import layout
from kvae_comfyui.kvae.load import described_state
from small_models import SMALL, small


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_a_gpu_are_channels_last_and_can_be_saved(name, monkeypatch, tmp_path):
    """This CPU stands for the GPU."""
    kvae = small(name)
    before = {key: weight.clone() for key, weight in kvae.state_dict().items()}
    monkeypatch.setattr(layout, "weight_format", lambda device: torch.channels_last_3d)
    kvae.fold()
    laid_out = [w for w in (*kvae.parameters(), *kvae.buffers()) if w.ndim == 5]
    assert all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in laid_out)
    assert not all(w.is_contiguous() for w in laid_out)
    pointers = [w.data_ptr() for w in (*kvae.parameters(), *kvae.buffers())]
    kvae.fold()
    assert pointers == [w.data_ptr() for w in (*kvae.parameters(), *kvae.buffers())]  # nothing is left to do
    safetensors.torch.save_file(described_state(kvae), tmp_path / "saved.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "saved.safetensors")
    assert all(torch.equal(saved[key], weight) for key, weight in before.items())


def test_back_on_a_cpu_they_run_as_before(monkeypatch):
    kvae, z = small("2.0-t4s8"), torch.randn(1, 16, 3, 4, 4)
    expected = kvae.decode(z)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(layout, "weight_format", lambda device: torch.channels_last_3d)
        kvae.fold()
    assert torch.equal(kvae.decode(z), expected)


def test_weights_that_are_trained_stay_where_they_are(monkeypatch):
    kvae = small("1.0").requires_grad_(True)
    pointers = [w.data_ptr() for w in kvae.parameters()]
    monkeypatch.setattr(layout, "weight_format", lambda device: torch.channels_last_3d)
    kvae.fold()
    assert pointers == [w.data_ptr() for w in kvae.parameters()]


def test_amds_gpus_are_not_taken_for_nvidias(monkeypatch):
    """PyTorch calls both cuda. Where nothing was measured, maps and strips are as they were on every GPU before."""
    gpu = torch.device("cuda")
    kvae = small("2.0-t4s8")
    shape = 1, 16, 6, 90, 160
    assert layout.fastest_format(gpu) == layout.weight_format(gpu) == torch.channels_last_3d
    assert Execution().strip_bytes_on(gpu) == plan_decode(kvae, shape, device=gpu).execution.strip_bytes == 1 << 30
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for other in (gpu, torch.device("mps")):
        assert layout.fastest_format(other) == layout.weight_format(other) == torch.contiguous_format
        assert Execution().strip_bytes_on(other) == 64 << 20
        assert plan_decode(kvae, shape, device=other).execution.strip_bytes == 256 << 20
