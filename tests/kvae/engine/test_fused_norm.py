"""The kernel of `fused_norm` is used where it works, and only there."""

import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import needs
from conftest import ROOT
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import engine
from kvae_comfyui.kvae.engine import fused_norm
from kvae_comfyui.kvae.engine.fused_norm import Kernel, LatentAffine, find_kernel
from small_models import SMALL, clip, latent, small

TRITON = "requirements-dev.txt, on Linux"
CASES = Path(__file__).with_name("fused_norm_cases.py")


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last_3d)


def assert_cases_pass(**variables: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


def test_the_kernel_gives_pytorchs_results_in_tritons_interpreter():
    needs.package("triton", TRITON)
    assert_cases_pass(TRITON_INTERPRET="1")


@needs.gpu
def test_the_kernel_gives_pytorchs_results_on_a_gpu():
    assert_cases_pass(TRITON_INTERPRET="0")


class Card:
    """What Triton asks its driver while it compiles, answered for a GPU that is not here."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # Triton keeps what it has compiled by this number

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return needs.package("triton.backends.compiler", TRITON).GPUTarget("cuda", self.capability, 32)


@pytest.mark.parametrize("rms", [False, True], ids=["group", "rms"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_is_compiled_once_for_all_sizes_and_reads_16_bytes_at_a_time(capability, rms, monkeypatch, tmp_path):
    triton = needs.package("triton", TRITON)
    from kvae_comfyui.kvae.engine import fused_norm_kernel

    compiled = []
    compile_only = partial(fused_norm_kernel.normalise.run, warmup=True)

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, **options: compiled.append(compile_only(*args, grid=grid, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused_norm_kernel, "normalise", Launcher())
    monkeypatch.setattr(triton.runtime.driver, "_active", Card(capability))
    for B, T, H, W in ((1, 5, 16, 32), (2, 1, 1, 9), (1, 4, 3, 1)):
        x, out = (channels_last(B, 256, T, H + n, W + n, dtype=torch.bfloat16) for n in (0, 2))
        affine = LatentAffine(*(channels_last(B, 256, 1, H, W) for _ in range(2)), (4, 1, 1))
        Kernel(x.device, x.dtype, 256, rms, shift=True, zeros=False)(x, out, affine, (1, 1))
    assert len(compiled) == 3
    (ptx,) = {kernel.asm["ptx"] for kernel in compiled}
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert accesses and all(".v4.b32" in access for access in accesses)


@pytest.fixture
def on_this_device(monkeypatch):
    """As if the kernel were for this device, and nothing had been tried yet. Gives the reasons why it failed."""
    failures: list[str] = []
    monkeypatch.setattr(fused_norm, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused_norm, "SYSTEMS", (sys.platform,))
    monkeypatch.setattr(fused_norm, "_checked", set())
    monkeypatch.setattr(fused_norm, "_failures", failures)
    return failures


def by_pytorch(kernel, x, out, affine, corner):
    """What the kernel computes, for the map of its check: one scale and shift for 2x2 positions, a border all round."""
    y = F.normalize(x.float(), dim=1) if kernel.rms else x.float()
    y = y * affine.scale.repeat_interleave(2, 3).repeat_interleave(2, 4)
    if affine.shift is not None:
        y = y + affine.shift.repeat_interleave(2, 3).repeat_interleave(2, 4)
    out.copy_(F.pad(F.silu(y), (1, 1, 1, 1, 0, 0), "constant" if kernel.zeros else "replicate"))


def raises(kernel, x, out, affine, corner):
    raise RuntimeError("no compiler\nand a long explanation")


def leaves_out_a_position(kernel, x, out, affine, corner):
    by_pytorch(kernel, x, out, affine, corner)
    out[0, :, 1, 2, 3] = torch.nan


def forgets_the_border(kernel, x, out, affine, corner):
    by_pytorch(kernel, x, out, affine, corner)
    out[:, :, :, 0] += 1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("broken", [raises, leaves_out_a_position, forgets_the_border])
def test_a_kernel_that_does_not_work_is_not_used(name, broken, monkeypatch, on_this_device, caplog):
    kvae = small(name)
    x, z = clip(kvae, 5, 1, 1), latent(kvae, 2, 1, 1)
    calls = []
    monkeypatch.setattr(Kernel, "__call__", lambda *args: calls.append(1) or broken(*args))
    with caplog.at_level(logging.INFO, fused_norm.__name__):
        ours = kvae.encode(x), kvae.decode(z)
    assert len(calls) == 1  # the check
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert on_this_device[0] in caplog.text and "\n" not in on_this_device[0]
    monkeypatch.setattr(fused_norm, "DEVICES", ())
    assert torch.equal(ours[0], kvae.encode(x)) and torch.equal(ours[1], kvae.decode(z))


def test_without_triton_pytorch_is_used(monkeypatch, on_this_device):
    monkeypatch.delattr(engine, "fused_norm_kernel", raising=False)  # as if no test had imported it
    monkeypatch.setitem(sys.modules, f"{fused_norm.__name__}_kernel", None)  # its import raises ImportError
    kvae = small("1.0")
    kvae.decode(latent(kvae, 2, 1, 1))
    assert "fused_norm_kernel" in on_this_device[0]


def test_memory_that_runs_out_says_nothing_about_the_kernel(monkeypatch, on_this_device):
    def runs_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Kernel, "__call__", runs_out)
    kvae = small("1.0")
    with pytest.raises(torch.OutOfMemoryError):
        kvae.decode(latent(kvae, 2, 1, 1))
    assert not on_this_device


@torch.no_grad()
def test_what_the_kernel_is_for(monkeypatch, on_this_device):
    monkeypatch.setattr(Kernel, "__call__", by_pytorch)

    def found(x: torch.Tensor, out: torch.Tensor) -> bool:
        return find_kernel(x, out, rms=True, shift=True, padding="zeros") is not None

    x, out = channels_last(2, 8, 3, 4, 4), channels_last(2, 8, 3, 6, 6)
    assert found(x, out)
    assert found(x[:, :, 1:, 1:3], out[:, :, 1:, 1:3])
    assert found(x.bfloat16(), out.bfloat16()) and found(x.half(), out.half())
    assert not found(x.double(), out.double())
    assert not found(x.contiguous(), out) and not found(x, out.contiguous())
    with torch.enable_grad():
        assert not found(x, out)
    assert not found(x, out[:1, :, :1].expand(1 << 16, -1, -1, -1, -1))  # too many frames
    assert not found(
        x, torch.empty_strided((1, 8, 1, 3, 3), (0, 1, 0, 1 << 30, 8), device="meta")
    )  # and too large ones
    for name, value in (("DEVICES", ("cuda",)), ("SYSTEMS", ("win32",))):
        with monkeypatch.context() as patch:
            patch.setattr(fused_norm, name, value)
            assert not found(x, out)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not found(x, out)
    assert not on_this_device


def test_the_check_draws_no_random_numbers_and_keeps_no_tensor(monkeypatch, on_this_device):
    monkeypatch.setattr(Kernel, "__call__", by_pytorch)
    x, out = channels_last(1, 1024, 1, 2, 2), channels_last(1, 1024, 1, 4, 4)
    state = torch.get_rng_state()
    with torch.no_grad(), PeakMemory() as memory:
        assert find_kernel(x, out, rms=True, shift=True, padding="replicate")
    assert memory.now == 0 and memory.peak < 4e6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_pass_through_pytorchs_operators(name, monkeypatch, on_this_device):
    monkeypatch.setattr(Kernel, "__call__", lambda *args: pytest.fail("used with gradients"))
    kvae = small(name)
    z = latent(kvae, 2, 1, 1).requires_grad_()
    kvae.decode(z).square().sum().backward()
    assert z.grad.abs().sum() > 0


def test_a_cpu_uses_no_kernel(monkeypatch):
    monkeypatch.setattr(Kernel, "__call__", lambda *args: pytest.fail("used on a CPU"))
    kvae = small("1.0")
    kvae.decode(latent(kvae, 2, 1, 1))
