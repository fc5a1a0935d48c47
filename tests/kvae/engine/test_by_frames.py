"""3-D convolutions as 2-D ones equal PyTorch's for every kernel of the model, in the memory that a plan allows them."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from apple_gpu import AppleGPU
from conftest import ROOT
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import plan_decode, plan_encode
from kvae_comfyui.kvae.engine import by_frames
from kvae_comfyui.kvae.engine.convolution import conv3d
from small_models import SMALL, assert_same, clip, latent, small

KERNELS = {  # all that the model has, with their strides
    "causal": ((3, 3, 3), (1, 1, 1)),
    "pointwise": ((1, 1, 1), (1, 1, 1)),
    "halving space": ((1, 3, 3), (1, 2, 2)),
    "halving time": ((3, 1, 1), (2, 1, 1)),
    "doubling space": ((1, 2, 2), (1, 1, 1)),
    "doubling time": ((2, 1, 1), (1, 1, 1)),
}
CHUNKS = {"rows": 4000, "frames": 60_000, "at once": by_frames.CHUNK_BYTES}


@pytest.fixture
def enabled(monkeypatch):
    monkeypatch.setattr(by_frames, "ENABLED", True)


@pytest.mark.parametrize(("kernel", "stride"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_a_convolution_by_frames_equals_pytorchs(kernel, stride, chunk, enabled, monkeypatch):
    monkeypatch.setattr(by_frames, "CHUNK_BYTES", chunk)
    weight, bias = torch.randn(9, 6, *kernel), torch.randn(9)
    whole = torch.randn(2, 6, 7, 20, 15)
    for x in (
        whole,
        whole.contiguous(memory_format=torch.channels_last_3d),
        whole[:, :, 1:, 3:9, 1:],
        whole.bfloat16(),
        whole.double(),
    ):
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        expected = F.conv3d(x.double(), w.double(), b.double(), stride)
        with torch.no_grad():
            y, without = conv3d(x, w, b, stride), conv3d(x, w, None, stride)
        assert y.dtype == x.dtype and y.stride(1) == (1 if x.stride(1) == 1 else expected.stride(1))
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(x.dtype, 3e-3)  # one rounding to bfloat16
        assert_same(y.double(), expected, tolerance)
        assert_same(without.double(), expected - b.double()[:, None, None, None], 2 * tolerance)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_by_frames_gives_the_same(name, enabled, monkeypatch):
    kvae = small(name)
    x, z = clip(kvae, 21), latent(kvae, 6)
    found = kvae.encode(x), kvae.decode(z)
    with AppleGPU(), torch.no_grad():
        on_apple = copy.deepcopy(kvae).to("mps")
        assert_same(on_apple.decode(z.to("mps")).cpu(), found[1], 1e-4)
    monkeypatch.setattr(by_frames, "ENABLED", False)
    assert_same(found[0], kvae.encode(x), 1e-4)
    assert_same(found[1], kvae.decode(z), 1e-4)


def test_gradients_use_pytorchs_convolution(enabled, monkeypatch):
    monkeypatch.setattr(by_frames, "conv3d", None)
    weight = torch.randn(4, 4, 3, 3, 3, requires_grad=True)
    conv3d(torch.randn(1, 4, 3, 5, 5), weight, None).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(("kernel", "stride"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("chunk", [1 << 18, 1 << 20], ids=["rows", "frames"])
def test_a_convolution_needs_no_more_than_its_workspace(kernel, stride, chunk, enabled, monkeypatch):
    monkeypatch.setattr(by_frames, "CHUNK_BYTES", chunk)
    x, weight = torch.randn(1, 32, 9, 34, 40), torch.randn(24, 32, *kernel)
    with torch.no_grad(), PeakMemory() as memory:
        y = conv3d(x, weight, None, stride)
    assert memory.peak - y.nbytes <= by_frames.workspace_bytes([weight])
    assert memory.peak - y.nbytes > chunk // 3  # else a chunk of this size would be no test of the bound


@pytest.mark.parametrize("name", SMALL)
def test_a_plan_allows_for_the_workspace(name, enabled):
    kvae = small(name)
    for source, plan, stream in (
        (latent(kvae, 6), plan_decode, kvae.decode_stream),
        (clip(kvae, 21), plan_encode, kvae.encode_stream),
    ):
        found = plan(kvae, source.shape)
        with torch.no_grad(), PeakMemory() as memory:
            for _ in stream(source, found.execution):
                pass
        assert memory.peak <= found.peak


def test_the_environment_enables_it():
    code = "from kvae_comfyui.kvae.engine import by_frames; print(by_frames.ENABLED)"
    for value, expected in (("2d", "True"), ("", "False")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"KVAE_CONV": value}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
