"""Norm, SiLU and border of a convolution's input, in one pass over memory: a Triton kernel for NVIDIA GPUs.

The kernel reads each value of a feature map once, normalises it, applies SiLU, and writes it once, straight into the
convolution's padded input; the values next to the picture's edge are also written to the border. PyTorch's operators
read and write the map for each of these steps. Where the kernel cannot run, the caller uses those operators instead.

    # B batch, C channels, T frames, H/W rows and columns, t/h/w latent frames, rows and columns
    # x_BCTHW
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import wants_autograd_or_graph

DEVICES = ("cuda",)
SYSTEMS = ("linux",)  # Triton's own packages are for Linux
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_FRAMES = (1 << 16) - 1  # of all clips in a batch: each is a row of CUDA's grid of programs
MOST_ELEMENTS = (1 << 31) - 1  # from the first to the last of a frame, so that 32 bits hold offsets

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentAffine:
    """Scale and shift of a norm, for blocks of positions: those of one latent, or all of them.

    Attributes:
        scale, shift: [B, C, t, h, w], or 1 in place of any number but C. The kernel computes in float32.
        block: frames, rows and columns that have the same scale and shift. Powers of two.
        skipped: frames and rows of the first block that come before those of x.
    """

    scale: Tensor
    shift: Tensor | None
    block: tuple[int, int, int] = (1, 1, 1)
    skipped: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Kernel:
    """out = SiLU(scale · x + shift), with a border, in one pass.

    Each combination of these attributes is compiled apart, at its first use; Triton keeps the result on disk.

    Attributes:
        rms: whether x is first divided by its norm over the channels, as `F.normalize` does.
        shift: whether there is one.
        zeros: whether the border is 0; otherwise it repeats the values next to it.
    """

    device: torch.device
    dtype: torch.dtype
    channels: int
    rms: bool
    shift: bool
    zeros: bool

    def __call__(self, x_BCTHW: Tensor, out: Tensor, affine: LatentAffine, corner: tuple[int, int]) -> None:
        """Write `out`: [B, C, T, H', W'], which has x from row and column `corner` on. The rest of it is border."""
        from . import fused_norm_kernel as compiled  # imports Triton, which few systems have

        B, C, T, H, W = x_BCTHW.shape
        rows, columns = out.shape[3:]
        channels = 1 << (C - 1).bit_length()
        positions = max(1, compiled.PROGRAM_ELEMENTS // channels)
        scale = affine.scale.contiguous(memory_format=torch.channels_last_3d)
        shift = scale if affine.shift is None else affine.shift.contiguous(memory_format=torch.channels_last_3d)
        assert scale.shape == shift.shape
        strides = [s.stride(dim) if s.shape[dim] > 1 else 0 for s in (x_BCTHW, out, scale) for dim in (0, 2, 3, 4)]
        with torch.cuda.device_of(x_BCTHW):  # Triton launches on the current device
            compiled.normalise[(-(-rows * columns // positions), B * T)](
                x_BCTHW, out, scale, shift, *strides,
                T, H, W, rows, columns, *corner,
                *(size.bit_length() - 1 for size in affine.block), *affine.skipped,
                C, channels, positions, self.rms, self.shift, self.zeros,
                num_warps=compiled.WARPS,
            )  # fmt: skip


_checked: set[Kernel] = set()  # those that gave the right result for a small map
_failures: list[str] = []  # why no kernel is used any more in this process


def find_kernel(x_BCTHW: Tensor, out: Tensor, rms: bool, shift: bool, padding: str) -> Kernel | None:
    """The kernel for these tensors, or None if PyTorch's operators must be used.

    There is one for channels-last maps of bfloat16, float16 or float32 on an NVIDIA GPU with Linux, without gradients
    and graph capture. Before its first use, its result for a small map is compared with PyTorch's. If that fails, no
    kernel is used in this process any more, and the log says why.

    Args:
        padding: "replicate" or "zeros", as in `fill_border`.
    """
    if x_BCTHW.device.type not in DEVICES or sys.platform not in SYSTEMS or torch.version.hip or _failures:
        return None
    if wants_autograd_or_graph() or x_BCTHW.dtype not in DTYPES:
        return None
    B, C, T, H, _ = out.shape
    if B * T > MOST_FRAMES or any(s.stride(1) != 1 or s.stride(3) * H > MOST_ELEMENTS for s in (x_BCTHW, out)):
        return None
    kernel = Kernel(x_BCTHW.device, x_BCTHW.dtype, C, rms, shift, padding == "zeros")
    return kernel if kernel in _checked or _is_right(kernel) else None


def _is_right(kernel: Kernel) -> bool:
    """Whether this kernel computes what PyTorch does. The host waits for the device."""
    try:
        error, allowed = _check(kernel)
        if not error <= allowed:  # nor NaN
            raise ValueError(f"its result differs from PyTorch's by {error:.1e}, and {allowed:.1e} is allowed")
    except torch.OutOfMemoryError:
        raise  # it says nothing about the kernel
    except Exception as error:
        _failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
        _log.warning("KVAE's norms run without the Triton kernel, which does not work here: %s", *_failures)
        return False
    _checked.add(kernel)
    return True


def _check(kernel: Kernel) -> tuple[float, float]:
    """How far the kernel is from PyTorch for a small map, with a latent for each 2x2 positions, and how far it may be.

    There are no random numbers in it, since drawing them would change those that the program draws next.
    """

    def waves(T: int, H: int, W: int, step: float) -> Tensor:
        count = T * H * W * kernel.channels
        wave = torch.arange(count, device=kernel.device, dtype=torch.float32).mul_(step).sin_()
        return wave.view(1, T, H, W, kernel.channels).permute(0, 4, 1, 2, 3)

    x, scale = waves(2, 4, 6, 0.7).to(kernel.dtype), waves(2, 2, 3, 1.3)
    shift = waves(2, 2, 3, 2.9) if kernel.shift else None
    out = torch.full_like(waves(2, 6, 8, 1.0), torch.nan, dtype=kernel.dtype)
    kernel(x, out, LatentAffine(scale, shift, (1, 2, 2)), (1, 1))
    y = F.normalize(x.float(), dim=1) if kernel.rms else x.float()
    y = y * scale.repeat_interleave(2, 3).repeat_interleave(2, 4)
    if shift is not None:
        y = y + shift.repeat_interleave(2, 3).repeat_interleave(2, 4)
    y = F.pad(F.silu(y), (1, 1, 1, 1, 0, 0), "constant" if kernel.zeros else "replicate")
    error = ((out.float() - y).norm() / y.norm()).item()
    return error, max(1e-5, torch.finfo(kernel.dtype).eps)
