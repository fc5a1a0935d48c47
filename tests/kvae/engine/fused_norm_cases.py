"""The kernel of `fused_norm` computes what PyTorch's operators do.

test_fused_norm.py runs this file. Without a GPU, one can also run it by

    TRITON_INTERPRET=1 python -m pytest tests/kvae/engine/fused_norm_cases.py

In a process of its own, since Triton reads this variable when it is imported, and its interpreter then replaces parts
of Triton itself.
"""

import os
import random
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

import needs
from kvae_comfyui.kvae import Execution, Recompute
from kvae_comfyui.kvae.engine import fused_norm, fused_norm_kernel, lazy_maps
from kvae_comfyui.kvae.engine.feature_map import Materialized
from kvae_comfyui.kvae.engine.fused_norm import Kernel, LatentAffine
from kvae_comfyui.kvae.engine.lazy_maps import LazyConv
from kvae_comfyui.kvae.engine.segment import SegmentRun
from kvae_comfyui.kvae.engine.stream_state import StreamState
from kvae_comfyui.kvae.layers import CausalConv3d, SpatialNorm, make_norm
from small_models import SMALL, assert_same, clip, latent, small

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CASES = 40


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """A list of the kernels that ran, their checks included. They also run on a CPU, by the interpreter."""
    done = []
    run = Kernel.__call__
    monkeypatch.setattr(fused_norm, "DEVICES", (DEVICE,))
    if DEVICE == "cpu":
        monkeypatch.setattr(fused_norm_kernel, "PROGRAM_ELEMENTS", 2048)  # the maps are small

    def noted(kernel, *args, **names):
        done.append(kernel)
        run(kernel, *args, **names)

    monkeypatch.setattr(Kernel, "__call__", noted)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        yield done
    assert not fused_norm._failures


@dataclass(frozen=True)
class Case:
    """The random choices of one case."""

    norm: str
    decoder: bool
    first: bool
    last_frames: int | None
    padding: str
    strip: tuple[int, int]
    slice: bool
    dtype: torch.dtype
    channels: int
    batch: int
    rate: int  # rows and columns for each latent


def drawn(number: int) -> Case:
    rng = random.Random(number)
    return Case(
        rng.choice(("group", "rms")),
        rng.random() < 0.7,
        rng.random() < 0.5,
        rng.choice((None, None, 2, 3)),
        rng.choice(("replicate", "zeros")),
        rng.choice(((0, 4), (0, 2), (1, 3), (2, 4))),
        rng.random() < 0.5,
        rng.choice((torch.bfloat16, torch.bfloat16, torch.float32, torch.float16)),
        rng.choice((4, 32, 96, 128)),
        rng.choice((1, 1, 2)),
        rng.choice((1, 2, 4)),
    )


def norm_of(case: Case) -> torch.nn.Module:
    config = replace(SMALL["1.0"], norm=case.norm, norm_groups=min(32, case.channels // 2), z_channels=5)
    norm = SpatialNorm(case.channels, config) if case.decoder else make_norm(case.channels, config)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    return norm.requires_grad_(False).bfloat16()  # exact in every dtype, but for float16


def channels_last(shape: tuple[int, ...], case: Case) -> torch.Tensor:
    """Random values; if the case says so, as a slice of a larger map: of its frames, rows and columns."""
    B, C, T, H, W = shape
    if not case.slice:
        return torch.randn(shape).to(DEVICE, case.dtype, memory_format=torch.channels_last_3d)
    larger = torch.randn(B, C, T + 1, H + 3, W + 2).to(DEVICE, case.dtype, memory_format=torch.channels_last_3d)
    return larger[:, :, 1:, 2:-1, 1:-1]


@dataclass
class Problem:
    """A case with its tensors: a map, its norm, the latent and the past."""

    case: Case

    def __post_init__(self):
        case = self.case
        T, t = (9, 3) if case.first else (8, 2)
        self.x = channels_last((case.batch, case.channels, T, 4, 8), case)
        self.z = channels_last((case.batch, 5, t, 4 // case.rate, 8 // case.rate), replace(case, slice=False))
        self.past = channels_last((case.batch, case.channels, 2, 4, 8), case)
        self.norm = norm_of(case)

    def padded(self, monkeypatch, kernel: bool) -> torch.Tensor:
        """What the convolution reads, with the kernel or without."""
        case = self.case
        state = StreamState({} if case.first else {"conv": Materialized(self.past)})
        z = self.z if case.decoder else None
        segment = SegmentRun(Execution(), state, case.first, True, case.dtype, self.x.device, torch.channels_last_3d, z)
        conv = CausalConv3d(case.channels, 1, padding=case.padding)
        conv.name = "conv"
        monkeypatch.setattr(lazy_maps, "conv3d", lambda padded, weight, bias: padded)
        with monkeypatch.context() as patch:
            if not kernel:
                patch.setattr(fused_norm, "DEVICES", ())
            lazy = LazyConv(segment, Materialized(self.x), conv, deepcopy(self.norm).to(DEVICE, case.dtype))
            lazy = lazy if case.last_frames is None else lazy.last_frames(case.last_frames)
            return lazy(*case.strip).cpu()

    def expected(self) -> torch.Tensor:
        """The same in float64, by the modules' own forward."""
        case = self.case
        x, z, past = (s.cpu().double() for s in (self.x, self.z, self.past))
        norm = deepcopy(self.norm).double()
        y = F.silu(norm(x, z, case.first) if case.decoder else norm(x))
        y = torch.cat([y[:, :, :1], y[:, :, :1], y] if case.first else [past, y], 2)
        y = y if case.last_frames is None else y[:, :, -2 - case.last_frames :]
        y = F.pad(y, (1, 1, 1, 1, 0, 0), "replicate" if case.padding == "replicate" else "constant")
        return y[:, :, :, case.strip[0] : case.strip[1] + 2]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("number", range(CASES))
def test_the_kernel_is_as_exact_as_pytorch(number, monkeypatch, launches):
    """At least as exact in 16 bits, since it rounds once."""
    problem = Problem(drawn(number))
    expected = problem.expected()
    ours = problem.padded(monkeypatch, kernel=True)
    assert launches[-1].dtype == problem.case.dtype
    launches.clear()
    pytorchs = problem.padded(monkeypatch, kernel=False)
    assert not launches
    assert ours.shape == pytorchs.shape == expected.shape and ours.dtype == problem.case.dtype
    if problem.case.dtype == torch.float32:
        assert error(ours, expected) < 1e-6
    elif problem.case.dtype == torch.bfloat16 and DEVICE == "cpu":
        assert error(ours, expected) < 2**-7  # the interpreter cuts off the last 16 bits instead of rounding
    else:
        assert error(ours, expected) <= error(pytorchs, expected)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_gives_the_same_with_the_kernel(name, monkeypatch, launches):
    """In two segments, with strips and recomputed frames; 1.0 has longer segments, so it has one."""
    kvae = small(name).to(DEVICE)
    per_position = kvae.config.norm_is_per_position
    execution = Execution(4, 1 << 16, Recompute.UPSAMPLED) if per_position else Execution()
    frames = 9 if per_position else 5
    sources = clip(kvae, frames, 1, 1), latent(kvae, frames // 4 + 1, 1, 1)
    x, z = (s.to(DEVICE, memory_format=torch.channels_last_3d) for s in sources)
    ours = kvae.encode(x, execution), kvae.decode(z, execution)
    assert len(launches) > 10
    monkeypatch.setattr(fused_norm, "DEVICES", ())
    for a, b in zip(ours, (kvae.encode(x, execution), kvae.decode(z, execution)), strict=True):
        assert_same(a, b)


@needs.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, without TRITON_INTERPRET=1: the map has 4 GB")
@pytest.mark.parametrize("clips", [1, 3])
def test_offsets_beyond_31_bits(clips):
    """The last frame begins 2.3e9 elements after the first, and so does the last clip."""
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory on the GPU")
    B, C, T, H, W = clips, 64, 3 // clips, 4200, 4300
    shape = (B, T, H, W, C)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_().permute(0, 4, 1, 2, 3)
    out = torch.empty((B, T, H + 2, W + 2, C), dtype=torch.bfloat16, device=DEVICE).permute(0, 4, 1, 2, 3)
    scale, shift = (torch.randn(1, C, 1, 1, 1, device=DEVICE).expand(B, -1, -1, -1, -1) for _ in range(2))
    Kernel(x.device, x.dtype, C, rms=False, shift=True, zeros=False)(x, out, LatentAffine(scale, shift), (1, 1))
    for rows, padded in ((slice(0, 3), slice(0, 4)), (slice(-3, None), slice(-4, None))):
        y = F.pad(F.silu(x[-1:, :, -1:, rows].double() * scale + shift)[:1], (1, 1, 1, 1, 0, 0), "replicate")
        y = y[:, :, :, :4] if rows.start == 0 else y[:, :, :, 1:]
        assert error(out[-1:, :, -1:, padded], y) < 2**-8
