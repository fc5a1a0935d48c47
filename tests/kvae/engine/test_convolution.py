"""The fast convolutions equal PyTorch's for all sizes, and wide models use Winograd's."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import KVAE, KVAEConfig, plan_decode, plan_encode
from kvae_comfyui.kvae.engine import winograd
from kvae_comfyui.kvae.engine.convolution import conv3d


@pytest.mark.parametrize("sides", [(1, 2, 2), (3, 5, 4), (2, 9, 7), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("chunk", [1, 24 << 20], ids=["tile by tile", "at once"])
def test_winograd_equals_the_convolution(sides, chunk, monkeypatch):
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk)
    T, H, W = sides
    x, weight, bias = torch.randn(2, 5, T + 2, H + 2, W + 2), torch.randn(7, 5, 3, 3, 3), torch.randn(7)
    expected = F.conv3d(x.double(), weight.double(), bias.double())
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        y = winograd.conv3d(x.contiguous(memory_format=layout), weight, bias)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert ((y - expected).norm() / expected.norm()).item() < 1e-6
    half = winograd.conv3d(x.half(), weight.half(), bias.half())
    expected = F.conv3d(x.half().double(), weight.half().double(), bias.half().double())
    assert ((half - expected).norm() / expected.norm()).item() < 5e-4  # one rounding, at the end


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 2, 2), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)], ids=str)
def test_conv3d_equals_pytorchs(kernel, stride):
    """Also for pictures of few rows and for slices, which PyTorch and oneDNN treat differently."""
    weight, bias = torch.randn(9, 6, *kernel), torch.randn(9)
    whole = torch.randn(1, 6, 7, 40, 30)
    for x in (
        whole,
        whole.contiguous(memory_format=torch.channels_last_3d),
        whole[:, :, 1:, 3:9, 1:],
        whole.bfloat16(),
    ):
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        expected = F.conv3d(x.double(), w.double(), b.double(), stride)
        with torch.no_grad():
            y = conv3d(x, w, b, stride)
        assert y.dtype == x.dtype
        assert ((y - expected).norm() / expected.norm()).item() < (1e-6 if x.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("channels", [8, 32, 64])
@pytest.mark.parametrize("rows", [1, 3, 5])
@torch.no_grad()
def test_a_result_of_one_column_does_not_depend_on_what_memory_held(channels, rows):
    x, weight = torch.randn(1, channels, 2, 2 * rows + 1, 3), torch.randn(channels, channels, 1, 3, 3)
    expected = F.conv3d(x.bfloat16().double(), weight.bfloat16().double(), None, (1, 2, 2))
    for _ in range(20):
        held = [torch.full((n,), torch.nan, dtype=torch.bfloat16) for n in (*(2**i for i in range(4, 15)), 192, 384)]
        del held  # the allocator gives this memory to the next tensors
        y = conv3d(x.bfloat16(), weight.bfloat16(), None, (1, 2, 2))
        torch.testing.assert_close(y.double(), expected, atol=0.1, rtol=0.01)


@pytest.fixture(scope="module")
def wide():
    config = KVAEConfig((128, 128, 128, 256), (128, 128, 128, 256), num_res_blocks=1)
    return KVAE(config).eval().requires_grad_(False).fold()


def test_a_wide_model_uses_winograd_and_stays_exact(wide, monkeypatch):
    z = torch.randn(1, 16, 3, 4, 4)
    x = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    calls = []
    conv3d = winograd.conv3d
    monkeypatch.setattr(winograd, "conv3d", lambda *args: calls.append(1) or conv3d(*args))
    fast = wide.decode(z), wide.encode(x)
    assert len(calls) > 10
    monkeypatch.setattr(winograd, "is_faster", lambda *args: False)
    for ours, direct in zip(fast, (wide.decode(z), wide.encode(x)), strict=True):
        assert ((ours - direct).norm() / direct.norm()).item() < 1e-5


def test_float64_is_computed_in_float64(wide):
    x, weight, bias = (
        t.double() for t in (torch.randn(1, 128, 5, 34, 34), torch.randn(128, 128, 3, 3, 3), torch.randn(128))
    )
    with torch.no_grad():
        y = conv3d(x, weight, bias)
    expected = F.conv3d(x, weight, bias)
    assert y.dtype == torch.float64
    assert ((y - expected).norm() / expected.norm()).item() < 1e-14
    double = copy.deepcopy(wide).double()
    z = torch.randn(1, 16, 3, 4, 4, dtype=torch.float64)
    with torch.enable_grad():
        by_modules = double.decode(z.clone().requires_grad_()).detach()
    assert ((double.decode(z) - by_modules).norm() / by_modules.norm()).item() < 1e-12


def test_the_workspace_of_winograd_is_planned(wide):
    for source, plan, stream in (
        (torch.randn(1, 16, 3, 8, 8), plan_decode, wide.decode_stream),
        (torch.rand(1, 3, 9, 64, 64), plan_encode, wide.encode_stream),
    ):
        found = plan(wide, source.shape)
        with torch.no_grad(), PeakMemory() as memory:
            for _ in stream(source, found.execution):
                pass
        # 25 %, since the maps of such small pictures are no larger than a chunk
        assert memory.peak <= found.peak <= 1.25 * memory.peak
