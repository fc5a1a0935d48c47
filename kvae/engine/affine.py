"""Norms as scale and shift, written straight into what a convolution reads, strip by strip.

# B batch, C channels, T frames, t latent frames, H/W and h/w rows and columns, lo:hi rows
# x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import RMSNorm, SpatialNorm, apply_scale_shift, wide
from .fused_norm import LatentAffine, find_kernel

ScaleShift = tuple[Tensor, Tensor | None]


class NormAffine:
    """A norm as scale and shift: GroupNorm's from its statistics, in the decoder with the latent's on top.

    Args:
        height: rows of the feature map.
        z_Bcthw: the latent that conditions the norm, in the decoder.
        first: whether the segment starts the stream, so that its first latent covers one frame.
        scale_shift: of the norm itself, [B or 1, C, 1, 1, 1] each; an RMS norm has no shift.
    """

    def __init__(self, norm: nn.Module, height: int, z_Bcthw: Tensor | None, first: bool, scale_shift: ScaleShift):
        self.height, self.z, self.first = height, z_Bcthw, first
        self.scale, self.shift = scale_shift
        self.spread: tuple[int, int] | None = None  # of `last_frames`: frames per latent, and how many frames in all
        self.spatial = norm if isinstance(norm, SpatialNorm) else None
        self.rms = isinstance(norm.norm_layer if isinstance(norm, SpatialNorm) else norm, RMSNorm)

    def last_frames(self, frames: int, T: int) -> NormAffine:
        """The same norm for the last of T frames alone."""
        part = copy(self)
        if self.z is not None:
            t, first = self.z.shape[2], int(self.first)
            rate = (T - first) // (t - first)
            part.z = self.z[:, :, t - -(-frames // rate) :]
            part.first, part.spread = False, (rate, frames)
        return part

    def write(self, x_BCTHW: Tensor, lo: int, hi: int, out: Tensor) -> None:
        """out = SiLU(norm(x)), for rows lo:hi of the source."""
        if out.device.type == "mps":  # wrong values in some versions if out is a slice: pytorch/pytorch#139006
            out.copy_(F.silu(self._norm(x_BCTHW, lo, hi, None)))
        else:
            F.silu(self._norm(x_BCTHW, lo, hi, out), inplace=True)

    def _norm(self, x_BCTHW: Tensor, lo: int, hi: int, out: Tensor | None) -> Tensor:
        """norm(x), in `out` if that is given."""
        if self.rms:
            x_BCTHW = torch.div(x_BCTHW, x_BCTHW.norm(dim=1, keepdim=True).clamp_min_(1e-12), out=out)
        if self.spatial is None:
            return self._apply(x_BCTHW, self.scale, self.shift, out)
        scale, shift, rate = self._of_latent(lo, hi)
        rows = torch.arange(lo, hi, device=scale.device) // rate - lo // rate
        scale, shift = (self._spread(s.to(x_BCTHW.dtype)[:, :, :, rows]) for s in (scale, shift))
        return apply_scale_shift(x_BCTHW, scale, shift, self.first, out=out)

    def write_fused(
        self, x_BCTHW: Tensor, lo: int, hi: int, out: Tensor, corner: tuple[int, int] = (0, 0), padding: str = "zeros"
    ) -> bool:
        """out = SiLU(norm(x)) with a border, for rows lo:hi of the source; False, with nothing written, if there is no
        kernel for it.

        Args:
            out: [B, C, T, H', W'], which has x from row and column `corner` on. The rest of it is border.
            padding: of the border, as in `fill_border`.
        """
        has_shift = self.spatial is not None or self.shift is not None
        kernel = find_kernel(x_BCTHW, out, self.rms, has_shift, padding)
        if kernel is None:
            return False
        if self.spatial is None:
            affine = LatentAffine(self.scale, self.shift)
        else:
            scale, shift, rate = self._of_latent(lo, hi)
            t, _, w = scale.shape[2:]
            frames, skipped = self._frames_of_latents(t, x_BCTHW.shape[2])
            affine = LatentAffine(scale, shift, (frames, rate, x_BCTHW.shape[4] // w), (skipped, lo % rate))
        kernel(x_BCTHW, out, affine, corner)
        return True

    def _of_latent(self, lo: int, hi: int) -> tuple[Tensor, Tensor, int]:
        """Scale and shift for the latents that cover rows lo:hi, [B, C, t, h, w] each, and rows per latent."""
        z, spatial = self.z, self.spatial
        assert z is not None and spatial is not None
        rate = self.height // z.shape[3]
        z = z[:, :, :, lo // rate : (hi - 1) // rate + 1]
        scale, shift = spatial.conv_y(z), spatial.conv_b(z)
        shift = shift if self.shift is None else scale * self.shift + shift
        return scale * self.scale, shift, rate

    def _frames_of_latents(self, t: int, T: int) -> tuple[int, int]:
        """Frames that each of t latents covers, and how many of the first one's come before the T frames."""
        if self.spread:
            rate, frames = self.spread
            return rate, t * rate - frames
        head = 1 if self.first and t > 1 else 0
        rate = (T - head) // (t - head)
        return rate, (rate - 1) * head

    def workspace_bytes(self, shape: Sequence[int], item_bytes: int, device: torch.device) -> int:
        """Bytes that normalising rows of this shape, [B, C, T, rows, W], needs in addition to input and output."""
        B, C, T, rows, W = shape
        # on Apple's GPU, where `out` is not written to, the results of three operators at a time
        results = 3 * item_bytes * B * C * T * rows * W if device.type == "mps" else 0
        norms = item_bytes * B * T * rows * W if self.rms else 0
        if self.z is None:
            return results + norms
        t, h, w = self.z.shape[2:]
        covered = min(h, -(-rows * h // self.height) + 1)  # rows of the latent
        scales = t * ((3 * item_bytes + 8) * covered + 2 * item_bytes * rows)  # and repeated for each row
        scales += 2 * item_bytes * rows * (T + t) if self.spread else 0  # and for each frame
        return results + max(norms, B * C * w * scales)

    def _spread(self, s_BCthw: Tensor) -> Tensor:
        """One value for each of the last frames, the first of which may lie inside a latent's block of frames."""
        if self.spread is None:
            return s_BCthw
        rate, frames = self.spread
        return s_BCthw.repeat_interleave(rate, 2)[:, :, -frames:]

    @staticmethod
    def _apply(x_BCTHW: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor | None) -> Tensor:
        if shift is None:
            return torch.mul(x_BCTHW, scale.to(x_BCTHW.dtype), out=out)
        if x_BCTHW.dtype.itemsize > 2 or x_BCTHW.is_cuda:
            return torch.addcmul(shift, x_BCTHW, scale, out=out)
        # in float32, rounded once at the end; frame by frame, since a CPU would convert the whole input first
        out = torch.empty_like(x_BCTHW) if out is None else out
        for x, y in zip(x_BCTHW.unbind(2), out.unbind(2), strict=True):
            x = x.float()
            y.copy_(torch.addcmul(shift[:, :, 0], x, scale[:, :, 0], out=x))
        return out


def rms_scale(norm: RMSNorm) -> Tensor:
    """What to multiply by after a division by the root of the sum of squares: [1, C, 1, 1, 1] in at least float32."""
    return wide(norm.gamma[None]) * len(norm.gamma) ** 0.5
