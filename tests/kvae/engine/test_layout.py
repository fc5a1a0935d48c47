"""Weights lie in memory as their device wants them, and everything else about them stays the same."""

import pytest
import safetensors.torch
import torch

from kvae_comfyui.kvae import Execution, layers, plan_decode, resample
from kvae_comfyui.kvae.engine import convolution, layout, lazy_maps
from kvae_comfyui.kvae.load import described_state
from small_models import SMALL, clip, joined, latent, small


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


def test_weights_that_a_host_moved_in_inference_mode_are_laid_out_and_may_meet_gradients(monkeypatch):
    """ComfyUI runs nodes in inference mode."""
    monkeypatch.setattr(layout, "weight_format", lambda device: torch.channels_last_3d)
    for name in SMALL:
        with torch.inference_mode():
            made_there = small(name)
        outside = small(name)
        for kvae in (made_there, outside):
            with torch.inference_mode():
                kvae.fold()
            laid_out = [w for w in kvae.parameters() if w.ndim == 5]
            assert all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in laid_out)
        z = latent(outside, 2).requires_grad_()
        outside.decode(z).sum().backward()
        assert z.grad is not None


@pytest.mark.parametrize("name", SMALL)
def test_all_convolutions_read_channels_last_memory(name, monkeypatch):
    """The past frames of resamplers, too, and the later segments; on a CPU as on an NVIDIA GPU."""
    kvae, convolve = small(name), convolution.conv3d
    formats = []

    def seen(x, *args, **options):
        formats.append(x.shape[1] == 1 or x.stride(1) == 1)
        return convolve(x, *args, **options)

    for module in (resample, lazy_maps, layers):
        monkeypatch.setattr(module, "conv3d", seen)
    with torch.no_grad():
        joined(kvae.encode_stream(clip(kvae, 40))), joined(kvae.decode_stream(latent(kvae, 10)))
    assert len(formats) > 50 and all(formats)


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
