"""Convolutions alone: their rate by memory format, and as 2-D convolutions of frames. The floor is at the best rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvae_comfyui.benchmarks.gpu.measure import FAILED, attempt, cost_of
from kvae_comfyui.benchmarks.gpu.models import source_of
from kvae_comfyui.benchmarks.gpu.setup import Setup, Size, shape_text
from kvae_comfyui.benchmarks.kvae import operations
from kvae_comfyui.benchmarks.tables import paragraph
from kvae_comfyui.kvae import KVAEConfig

META = torch.device("meta")
REPEATS = 5
Convolution = Callable[[Tensor, Tensor], Tensor]


def section(setup: Setup) -> Iterator[str]:
    """The table of rates; keeps the best one for the floor."""
    yield "## One 3x3x3 convolution, TFLOP/s"
    yield ""
    yield from paragraph(
        f"{str(setup.dtype)[6:]}; as many channels out as in, at the size that the decoder of KVAE-3D-1.0 has there in "
        "a segment of 16 frames. *2-D*: three convolutions of frames, summed, for cards on which conv3d is slow. The "
        "floor of a run is the time that its arithmetic needs at the best rate of this table."
    )
    yield ""
    yield "| channels | size | NCDHW | NDHWC | 2-D, NHWC |"
    yield "|---|---|---|---|---|"
    frames, height, width = setup.sizes[0]
    for level, channels in enumerate(setup.family["1.0"].decoder_widths):
        size = max(1, (frames - 1) // 2 >> max(0, level - 1)), height >> level, width >> level
        rates = [
            rate_of(setup, channels, size, format, convolve)
            for format, convolve in (
                (torch.contiguous_format, F.conv3d),
                (torch.channels_last_3d, F.conv3d),
                (torch.channels_last_3d, by_frames),
            )
        ]
        cells = [f"{rate / 1e12:.3g}" if rate else FAILED for rate in rates]
        yield f"| {channels} | {shape_text(size)} | {' | '.join(cells)} |"


@torch.inference_mode()
def rate_of(
    setup: Setup, channels: int, size: Size, format: torch.memory_format, convolve: Convolution
) -> float | None:
    """Operations per second, the best of a few runs; None if memory ran out. The figures keep it for the floor."""
    T, H, W = size

    def measure() -> float:
        x, weight = (
            torch.randn(shape, device=setup.device, dtype=setup.dtype).contiguous(memory_format=format)
            for shape in ((1, channels, T + 2, H + 2, W + 2), (channels, channels, 3, 3, 3))
        )
        costs = [cost_of(lambda: convolve(x, weight), setup.device) for _ in range(REPEATS)]
        return min(cost.seconds if cost else math.inf for cost in costs)

    seconds = attempt(measure, setup.device)
    if seconds is None or math.isinf(seconds):
        return None
    setup.figures["rate"].append(2 * 27 * channels**2 * T * H * W / seconds)
    return setup.figures["rate"][-1]


def by_frames(x: Tensor, weight: Tensor) -> Tensor:
    """`conv3d(x, weight)` of one clip as 2-D convolutions of all frames, one for each frame of the kernel."""
    frames = x[0].transpose(0, 1)
    kernels = [each.contiguous(memory_format=torch.channels_last) for each in weight.unbind(2)]
    T = len(frames) - 2
    y = F.conv2d(frames[:T], kernels[0])
    for i in (1, 2):
        y += F.conv2d(frames[i : i + T], kernels[i])
    return y.transpose(0, 1)[None]


@lru_cache
def operations_of(config: KVAEConfig, direction: str, size: Size) -> int:
    """Operations of a run for a clip of this size."""
    return operations(config, direction, source_of(config, direction, size, META, torch.bfloat16))


def floor(setup: Setup, config: KVAEConfig, direction: str, size: Size) -> float:
    """Seconds that the arithmetic of a run needs at the best rate of one convolution."""
    if "rate" not in setup.figures:
        rate_of(setup, config.decoder_widths[1], (16, size[1] // 4, size[2] // 4), torch.channels_last_3d, F.conv3d)
    return operations_of(config, direction, size) / max(setup.figures["rate"], default=math.nan)
