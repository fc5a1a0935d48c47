"""Every execution gives the modules' own result: executions, models and clips are drawn at random.

    KVAE_FUZZ_TRIALS=2000 python -m pytest tests/kvae/engine/test_fuzz.py       # more trials
    python -m pytest "tests/kvae/engine/test_fuzz.py::test_every_execution_gives_the_modules_own_result[1234]"  # one

The number of a trial determines it, whatever other trials run. The reference is the modules' own `forward` in float64,
segment by segment, on a clip that is padded here by hand; test_kvae.py compares `forward` with diffusers.
"""

import os
import random
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from kvae_comfyui.kvae import KVAE, SEGMENT_FRAMES, Execution, KVAEConfig, Posterior
from kvae_comfyui.kvae.engine.execution import frames_to_recompute

TRIALS = int(os.environ.get("KVAE_FUZZ_TRIALS", "240"))
TWO = {"norm": "rms", "downsample_version": 2}
MODELS = {
    "1.0": ((16, 16, 32, 32), (16, 16, 32, 32), {"norm_groups": 4}),
    "2.0-t4s8": ((4, 8, 8, 16), (4, 8, 8, 16), TWO),
    "2.0-t4s16": (
        (4, 4, 8, 8, 16),
        (4, 8, 8, 8, 16),
        TWO | {"z_channels": 64, "temporal_start_level": 1, "padding": "zeros"},
    ),
    "2.0, time last": ((4, 8, 8), (4, 8, 8), TWO | {"temporal_compress_times": 2, "temporal_start_level": 1}),
    "2.0, no time": ((4, 8), (4, 8), TWO | {"temporal_compress_times": 1, "padding": "zeros"}),
    "2.0, halved as 1.0": ((4, 8, 8, 8), (4, 8, 8, 8), {"norm": "rms", "temporal_compress_times": 8}),
}
OFTEN = [name for name in MODELS for _ in range(1 if "," in name else 4)] + ["2.0-t4s16"] * 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.0}  # relative, from the float64 reference
AS_THE_MODULES = 1.5  # else at most this many times the error of the modules themselves in that dtype


@dataclass(frozen=True)
class Trial:
    """The random choices of one trial."""

    model: str
    blocks: int
    decode: bool
    stream: bool
    execution: Execution
    shape: tuple[int, ...]  # of the clip: batch, frames, rows and columns of pixels
    dtype: torch.dtype
    memory_format: torch.memory_format
    chunks: tuple[int, ...]  # lengths of the chunks in which a stream of frames to encode comes


def drawn(number: int) -> Trial:
    rng = random.Random(number)
    name, blocks, decode = rng.choice(OFTEN), rng.choice((1, 2)), rng.random() < 0.5
    kvae = model(name, blocks, torch.float64)
    cadence, side = kvae.config.temporal_compress_times, kvae.config.spatial_factor
    segment = rng.choice((1, 1, 2, 3, 4)) * cadence if kvae.config.norm_is_per_position else SEGMENT_FRAMES
    most = 3 if segment >= frames_to_recompute(len(kvae.decoder.full_resolution())) else 2
    tiles = (1, 1)
    if kvae.config.norm_is_per_position and rng.random() < 0.2:
        tiles = rng.choice(((2, 1), (1, 2), (2, 2), (3, 1)))
    execution = Execution(segment, rng.choice((1, 1 << 12, 1 << 15, 64 << 20)), rng.randint(0, most), tiles)
    batch, frames = rng.choice((1, 1, 2)), rng.randint(1, 41)
    rows, columns = rng.randint(1, 3), rng.randint(1, 3)
    if tiles != (1, 1):  # the picture is larger than the halo on one side
        rows, columns = rng.choice(((30, 1), (1, 30), (2, 3)))
        batch, frames = 1, min(frames, 5)
    short = (0, 0) if decode else (rng.randrange(side), rng.randrange(side))
    return Trial(
        name,
        blocks,
        decode,
        tiles == (1, 1) and rng.random() < 0.5,
        execution,
        (batch, frames, rows * side - short[0], columns * side - short[1]),
        rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16)),
        rng.choice((torch.contiguous_format, torch.channels_last_3d)),
        tuple(rng.randint(1, 20) for _ in range(frames)),
    )


@cache
def model(name: str, blocks: int, dtype: torch.dtype) -> KVAE:
    """A frozen model of random weights, which are exact, and so the same, in every dtype."""
    if dtype != torch.float64:
        rounded = KVAE(model(name, blocks, torch.float64).config)
        rounded.load_state_dict(model(name, blocks, torch.float64).state_dict())
        return rounded.to(dtype).eval().requires_grad_(False).fold()
    torch.manual_seed(0)
    encoder, decoder, more = MODELS[name]
    kvae = KVAE(KVAEConfig(encoder, decoder, num_res_blocks=blocks, **more)).eval().requires_grad_(False)
    for key, parameter in kvae.named_parameters():
        if parameter.ndim < 2 or key.endswith("gamma"):
            torch.nn.init.normal_(parameter, mean=float(key.endswith("gamma")), std=0.1)
    return kvae.bfloat16().double().fold()  # exact in every dtype


def source_of(trial: Trial, kvae: KVAE) -> torch.Tensor:
    """The latent or the clip, of values that are exact in every dtype."""
    batch, frames, height, width = trial.shape
    if not trial.decode:
        x = torch.rand(batch, 3, frames, height, width) * 2 - 1
    else:
        t, side = (frames - 1) // kvae.config.temporal_compress_times + 1, kvae.config.spatial_factor
        x = torch.randn(batch, kvae.config.z_channels, t, height // side, width // side)
    return x.bfloat16().to(memory_format=trial.memory_format)


def by_the_modules(trial: Trial, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The modules' own `forward`, in segments of 17, 16, 16 … frames."""
    kvae = model(trial.model, trial.blocks, dtype)
    cadence, side = kvae.config.temporal_compress_times, kvae.config.spatial_factor
    length, coder = SEGMENT_FRAMES // cadence, kvae.decoder
    x = source.to(dtype, memory_format=torch.contiguous_format)
    if not trial.decode:
        length, coder = SEGMENT_FRAMES, kvae.encoder
        ends = [n - 1 for n in x.shape[2:]]
        sides = (1 + -(-ends[0] // cadence) * cadence, *(-(-n // side) * side for n in x.shape[3:]))
        for dim, (end, n) in enumerate(zip(ends, sides, strict=True), start=2):
            x = x.index_select(dim, torch.arange(n).clamp(max=end))
    pieces = x.tensor_split(tuple(range(length + 1, x.shape[2], length)), dim=2)
    memory: dict[str, torch.Tensor] = {}
    return torch.cat([coder(piece, memory) for piece in pieces], dim=2)


def by_the_execution(trial: Trial, source: torch.Tensor) -> torch.Tensor:
    """All of the moments, or the frames."""
    kvae = model(trial.model, trial.blocks, trial.dtype)
    x = source.to(trial.dtype)
    if trial.decode:
        return (
            torch.cat(list(kvae.decode_stream(x, trial.execution)), 2)
            if trial.stream
            else kvae.decode(x, trial.execution)
        )
    if trial.execution.tiles != (1, 1):
        return kvae.encode(x, trial.execution)
    if not trial.stream:
        return both(kvae.posterior(x, trial.execution))
    sizes = [n for n in trial.chunks if n][: x.shape[2]]
    bounds = torch.tensor(sizes).cumsum(0)
    chunks = x.tensor_split(bounds[bounds < x.shape[2]].tolist(), dim=2)
    return torch.cat([both(p) for p in kvae.encode_stream(iter(chunks), trial.execution)], dim=2)


def both(posterior: Posterior) -> torch.Tensor:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("number", range(TRIALS))
def test_every_execution_gives_the_modules_own_result(number):
    trial = drawn(number)
    torch.manual_seed(number)
    kvae = model(trial.model, trial.blocks, torch.float64)
    source = source_of(trial, kvae)
    with torch.no_grad():
        expected = by_the_modules(trial, source, torch.float64)
        if trial.execution.tiles != (1, 1) and not trial.decode:
            expected = expected[:, : kvae.config.z_channels]
        y = by_the_execution(trial, source)
        assert y.dtype == trial.dtype and y.shape == expected.shape, trial
        error, allowed = relative(y, expected), TOLERANCE[trial.dtype]
        if error > allowed:
            theirs = by_the_modules(trial, source, trial.dtype)[:, : expected.shape[1]]
            allowed = AS_THE_MODULES * relative(theirs, expected)
    assert error <= allowed, trial
