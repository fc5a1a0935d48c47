"""Differences between two videos: PSNR, SSIM, temporal error and colour bias.

# x reference, y what is compared with it
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255  # of pixels in 0..255, the units of all errors here
LEAST_MSE = 1e-9  # of pixels in 0..255: equal videos have a PSNR of 138 dB


def psnr(y: Tensor, x: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over a whole clip, for pixels in 0..255 in any layout."""
    return (10 * torch.log10(PEAK**2 / (y - x).square().mean().clamp(min=LEAST_MSE))).item()


def temporal_error(y_3THW: Tensor, x_3THW: Tensor) -> float:
    """Root mean square change of the error from frame to frame (flicker), in 0..255; NaN for one frame.

    A static error, such as blur, does not count.
    """
    error = y_3THW - x_3THW
    return error.diff(dim=1).square().mean().sqrt().item()


def compare(y_THW3: Tensor, x_THW3: Tensor) -> dict[str, float]:
    """All metrics of two videos [T, H, W, 3] in 0..1; see `Comparison`.

    Raises:
        ValueError: the shapes differ.
    """
    if y_THW3.shape != x_THW3.shape:
        raise ValueError(
            f"the videos have shapes {list(y_THW3.shape)} and {list(x_THW3.shape)}; expected two of one shape"
        )
    comparison = Comparison()
    for y_HW3, x_HW3 in zip(y_THW3, x_THW3, strict=True):
        comparison.add(y_HW3, x_HW3)
    return comparison.metrics()


class Comparison:
    """Two videos, compared frame by frame in float64, since a clip may be gigabytes."""

    def __init__(self) -> None:
        self.frames, self.ssim_sum = 0, 0.0
        self.square = self.bias = self.change = torch.zeros((), dtype=torch.float64)
        self.before: Tensor | None = None

    def add(self, y_HW3: Tensor, x_HW3: Tensor) -> float:
        """Add the next frame of both, in 0..1; return its squared error, for pixels in 0..255."""
        y, x = y_HW3.cpu(), x_HW3.cpu()  # some devices have no float64
        error = (y - x).double() * PEAK
        square = error.square().mean()
        self.square = self.square + square
        self.bias = self.bias + error.mean((0, 1))
        self.ssim_sum += ssim(y, x).item()
        if self.before is not None:
            self.change = self.change + (error - self.before).square().mean()
        self.before = error
        self.frames += 1
        return square.item()

    def metrics(self) -> dict[str, float]:
        """Of the frames so far.

        Returns:
            psnr: dB over the whole clip.
            ssim: mean over frames and channels.
            flicker: root mean square change of the error from frame to frame, in 0..255; 0 for one frame.
            red, green, blue: mean error of each channel (colour bias), in 0..255.
        """
        red, green, blue = (self.bias / self.frames).tolist()
        return {
            "psnr": psnr_of(self.square.item() / self.frames),
            "ssim": self.ssim_sum / self.frames,
            "flicker": math.sqrt(self.change.item() / max(self.frames - 1, 1)),
            "red": red,
            "green": green,
            "blue": blue,
        }


def psnr_of(mse: float) -> float:
    """A mean squared error of pixels in 0..255, in dB."""
    return 10 * math.log10(PEAK**2 / max(mse, LEAST_MSE))


def ssim(y_HWC: Tensor, x_HWC: Tensor) -> Tensor:
    """Structural similarity of two pictures in 0..1 (Wang et al. 2004): a scalar, 1 for equal pictures.

    The window is a Gaussian of 11 pixels with a standard deviation of 1.5; only windows inside the picture count.
    """
    size = min(11, *x_HWC.shape[:2])
    ramp = torch.arange(size, dtype=torch.float32, device=x_HWC.device) - (size - 1) / 2
    window = torch.exp(-ramp.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    y, x = (v.float().permute(2, 0, 1)[:, None] for v in (y_HWC, x_HWC))
    mean_y, mean_x = blur(y), blur(x)
    var_y, var_x, cov = blur(y * y) - mean_y**2, blur(x * x) - mean_x**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean()


def difference_picture(y: Tensor, x: Tensor, gain: float = 8) -> Tensor:
    """The error of pixels in 0..1 as a picture in 0..1: grey plus `gain` times y − x."""
    return (0.5 + gain * (y - x)).clamp(0, 1)


def as_text(rows: dict[str, dict[str, float]]) -> str:
    """A table of metrics and costs, one line for each row, with units in the head."""
    heads = {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker", "red": "red", "green": "green", "blue": "blue"}
    heads |= {"encode": "encode s", "decode": "decode s", "peak": "peak GB"}
    columns = [key for key in heads if any(key in row for row in rows.values())]
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{heads[key]:>10}" for key in columns)]
    for name, row in rows.items():
        cells = (f"{row[key]:>10.{4 if key == 'ssim' else 2}f}" if key in row else " " * 10 for key in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
