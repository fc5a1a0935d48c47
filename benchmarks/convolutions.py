"""The model's convolutions by PyTorch's conv3d and as 2-D ones (KVAE_CONV=2d), on the device at hand.

    python -m benchmarks.convolutions                         # on a GPU if PyTorch finds one
    python -m benchmarks.convolutions --device mps --dtype float32 --size 17x480x832

Each shape of convolution in a decode or an encode of one segment is timed both ways, in turns; seconds are medians,
multiplied by how often the shape occurs. GB are the most that PyTorch allocated on CUDA or ROCm for one convolution, in
addition to its input, weight and bias. If the last column is well above 1 in the line "all", set KVAE_CONV=2d. For
ComfyUI on an AMD GPU, measure with --no-miopen, unless COMFYUI_ENABLE_MIOPEN=1 is set there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvae_comfyui.benchmarks.tables import publish
from kvae_comfyui.kvae import FAMILY, KVAE, Execution, KVAEConfig
from kvae_comfyui.kvae.engine import by_frames
from kvae_comfyui.kvae.engine.layout import fastest_format, weight_format

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WHOLE = Execution(strip_bytes=1 << 40)  # one strip: other shapes differ in their rows only
Convolution = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # shapes of input and weight; stride


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.0", choices=tuple(FAMILY), help="kind of KVAE-3D (default 1.0)")
    parser.add_argument("--size", default="17x256x256", help="FRAMESxHEIGHTxWIDTH (default 17x256x256)")
    parser.add_argument("--device", default=best_device(), help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES), help="(default bfloat16)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way, after one that is not timed")
    parser.add_argument("--no-miopen", action="store_true", help="as ComfyUI runs on most AMD GPUs")
    options = parser.parse_args()
    torch.backends.cudnn.enabled = not options.no_miopen  # PyTorch's name for MIOpen, too
    frames, height, width = map(int, options.size.split("x"))
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    publish(rows(FAMILY[options.model], (frames, height, width), device, dtype, options.rounds), None)


def best_device() -> str:
    """A GPU if PyTorch finds one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@torch.no_grad()
def rows(
    config: KVAEConfig, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rounds: int
) -> Iterator[str]:
    """The rows of the table: both directions, a line for each shape, and the sums."""
    yield f"{name_of(device)}, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, size))}."
    yield ""
    yield "| | input | kernel | stride | times | conv3d s | as 2-D s | conv3d GB | as 2-D GB | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for direction, found in convolutions(config, *size).items():
        sums = [0.0, 0.0]
        for (x, weight, stride), times in found.items():
            seconds, gigabytes = compare((x, weight, stride), device, dtype, rounds)
            sums = [total + times * each for total, each in zip(sums, seconds, strict=True)]
            shapes = [f"{x[1]}x{x[2]}x{x[3]}x{x[4]}", "x".join(map(str, weight)), "x".join(map(str, stride))]
            costs = [*(f"{times * each:.4f}" for each in seconds), *(f"{each:.3f}" for each in gigabytes)]
            yield f"| {direction} | {' | '.join([*shapes, str(times), *costs])} | {seconds[0] / seconds[1]:.2f} |"
        yield f"| {direction} | all | | | | {sums[0]:.4f} | {sums[1]:.4f} | | | {sums[0] / sums[1]:.2f} |"


def name_of(device: torch.device) -> str:
    """The name of the device, with PyTorch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, PyTorch {torch.__version__}"


def convolutions(config: KVAEConfig, frames: int, height: int, width: int) -> dict[str, Counter[Convolution]]:
    """The shapes of the convolutions that decode and encode a clip, and how often each occurs."""
    with torch.device("meta"):
        kvae = KVAE(config).requires_grad_(False).fold()
        x = torch.empty(1, 3, frames, height, width)
    with Shapes() as encode:
        z = kvae.encode(x, WHOLE)
    with Shapes() as decode:
        kvae.decode(z, WHOLE)
    return {"decode": decode.found, "encode": encode.found}


class Shapes(TorchDispatchMode):
    """A context that counts the shapes of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.convolution:
            x, weight, _, stride = args[:4]
            self.found[tuple(x.shape), tuple(weight.shape), tuple(stride)] += 1
        return func(*args, **(kwargs or {}))


def compare(
    convolution: Convolution, device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[list[float], list[float]]:
    """Median seconds and GB of a convolution both ways."""
    x_shape, weight_shape, stride = convolution
    x = torch.randn(x_shape, dtype=dtype, device=device).contiguous(memory_format=fastest_format(device))
    weight = torch.randn(weight_shape, dtype=dtype, device=device).contiguous(memory_format=weight_format(device))
    bias = torch.randn(weight_shape[0], dtype=dtype, device=device)
    ways: list[Callable[..., Tensor]] = [F.conv3d, by_frames.conv3d]
    runs = [[timed(way, x, weight, bias, stride) for way in ways] for _ in range(1 + rounds)][1:]
    seconds, gigabytes = ([[run[i][j] for run in runs] for i in range(2)] for j in range(2))
    return [statistics.median(each) for each in seconds], [max(each) for each in gigabytes]


def timed(way: Callable[..., Tensor], *args: object) -> tuple[float, float]:
    """Seconds of a convolution, and the GB that it allocated on CUDA."""
    x = args[0]
    assert isinstance(x, Tensor)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device) if x.is_cuda else 0
    wait_for(x.device)
    start = time.perf_counter()
    way(*args)
    wait_for(x.device)
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated(x.device) - before) / 1e9 if x.is_cuda else 0.0


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


if __name__ == "__main__":
    main()
