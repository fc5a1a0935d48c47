"""How far one video is from another: PSNR, SSIM, flicker and colour bias, on frames as hosts hold them.

# x, y float [T, H, W, 3] in 0..1
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def figures(y: Tensor, x: Tensor) -> dict[str, float]:
    """Of `y` against the reference `x`, both [T, H, W, 3] in 0..1.

    Returns:
        psnr: dB over the whole clip.
        ssim: mean over frames and channels, Gaussian window of 11 pixels.
        flicker: root mean square change of the error from frame to frame, in 0..255; 0 for one frame.
        red, green, blue: mean error of each channel, in 0..255.

    Raises:
        ValueError: the shapes differ.
    """
    if y.shape != x.shape:
        raise ValueError(f"the videos have shapes {list(y.shape)} and {list(x.shape)}; expected two of one shape")
    square = bias = change = ssim_sum = torch.zeros((), dtype=torch.float64)
    before = None
    for a, b in zip(y, x, strict=True):  # frame by frame, as a clip may be gigabytes
        a, b = a.cpu(), b.cpu()  # some devices have no float64
        error = (a - b).double() * 255
        square = square + error.square().mean()
        bias = bias + error.mean((0, 1))
        ssim_sum = ssim_sum + ssim(a, b)
        if before is not None:
            change = change + (error - before).square().mean()
        before = error
    T = len(x)
    red, green, blue = (bias / T).tolist()
    return {
        "psnr": 10 * math.log10(255**2 / max(square.item() / T, 1e-9)),
        "ssim": ssim_sum.item() / T,
        "flicker": math.sqrt(change.item() / max(T - 1, 1)),
        "red": red,
        "green": green,
        "blue": blue,
    }


def ssim(y_HWC: Tensor, x_HWC: Tensor) -> Tensor:
    """Structural similarity of two pictures in 0..1 (Wang et al. 2004): scalar, 1 for equal ones."""
    size = min(11, *x_HWC.shape[:2])
    ramp = torch.arange(size, dtype=torch.float32, device=x_HWC.device) - (size - 1) / 2
    bell = torch.exp(-ramp.square() / (2 * 1.5**2))
    bell = bell / bell.sum()

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    y, x = (v.float().permute(2, 0, 1)[:, None] for v in (y_HWC, x_HWC))
    mean_y, mean_x = blur(y), blur(x)
    var_y, var_x, cov = blur(y * y) - mean_y**2, blur(x * x) - mean_x**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return likeness.mean()


def difference(y: Tensor, x: Tensor, gain: float = 8) -> Tensor:
    """A picture of what differs: grey where equal, brighter or darker by `gain` times the error. Shape of `x`."""
    return (0.5 + gain * (y - x)).clamp(0, 1)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of figures as text, one line each, units in the head."""
    units = {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker", "red": "red", "green": "green", "blue": "blue"}
    units |= {"encode": "encode s", "decode": "decode s", "peak": "peak GB"}
    columns = [key for key in units if any(key in row for row in rows.values())]
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{units[key]:>10}" for key in columns)]
    for name, row in rows.items():
        cells = (f"{row[key]:>10.{4 if key == 'ssim' else 2}f}" if key in row else " " * 10 for key in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
