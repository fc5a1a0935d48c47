"""The resamplers of KVAE-3D, run as fewer and smaller convolutions than they are written as.

As published, a downsampler is a mean over neighbours plus strided convolutions, then a 1x1x1 convolution; an upsampler
repeats neighbours, adds convolutions of the repeated, then a 1x1x1 convolution. All of it is linear, so it folds:
downsampling into one 3x3 convolution over space and one of three taps over time, upsampling into a 2x2 convolution of
the small image for each of the four parities of the large one, and two taps for each of two parities of time.
That is 2 to 2.5 times less arithmetic, and nothing large is repeated. Frozen weights are folded once, and again when
they are seen to have changed.

    # o output channels, i input channels, k taps; x_BCTHW
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KVAEConfig
from .engine.convolution import conv3d
from .layers import Cache, Streamed, framed, like, remember, wide

PARITIES = ((0, 0), (0, 1), (1, 0), (1, 1))


class Resampler(Streamed):
    """Weights as published, and what they fold into: `compose` says how, `folded` keeps the result while frozen."""

    linear: nn.Conv3d

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, int]] = []  # the published weights that were folded, and their versions
        self.register_load_state_dict_post_hook(_unfold)  # of weights without a version too, made in inference mode

    def compose(self) -> dict[str, Tensor]:
        """The folded weights, from the published ones, in at least float32."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The weights to run with: kept ones, folded anew where the published have changed.

        Nothing is kept of weights that take gradients, so that these reach them, nor in a graph that is captured.
        """
        if not self._frozen or torch.compiler.is_compiling():
            return {name: tensor.to(self.linear.weight.dtype) for name, tensor in self.compose().items()}
        self.fold()
        return {name.removeprefix("folded_"): buffer for name, buffer in self.named_buffers()}

    def fold(self) -> None:
        """Keep the folded weights, beside the published ones and outside the state dict, where these are frozen."""
        if not self._frozen or self._kept():
            return
        self.unfold()
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self.compose().items():
                self.register_buffer(f"folded_{name}", tensor.to(self.linear.weight.dtype, copy=True), persistent=False)
        self._see()

    def unfold(self) -> None:
        """Forget them."""
        self._seen = []
        for name, _ in list(self.named_buffers()):
            delattr(self, name)

    @property
    def _frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def _see(self) -> None:
        self._seen = [(parameter.detach(), version(parameter)) for parameter in self.parameters()]

    def _kept(self) -> bool:
        """Whether the weights are those that were folded: the same memory, not written to since."""
        return bool(self._seen) and all(
            (parameter.data_ptr(), parameter.dtype, version(parameter)) == (seen.data_ptr(), seen.dtype, then)
            for parameter, (seen, then) in zip(self.parameters(), self._seen, strict=True)
        )

    def _apply(self, fn, recurse=True):
        """Moved, the folded weights move along; of another type, they are to be folded from what the others became."""
        kept, dtype = self._kept(), self.linear.weight.dtype
        super()._apply(fn, recurse)
        if kept and self.linear.weight.dtype == dtype:
            self._see()
        else:
            self.unfold()
        return self


def version(parameter: Tensor) -> int:
    """How often it was written to, as far as autograd knows; weights made in inference mode do not count that."""
    return 0 if parameter.is_inference() else parameter._version


def _unfold(resampler: Resampler, _: object) -> None:
    resampler.unfold()


class TemporalConv(nn.Module):
    """The weights of a convolution over time, under the name that the checkpoint gives them; only ever run folded."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (taps, 1, 1))


class Downsample(Resampler):
    """Halve rows and columns, and frames where `time`. In 2.0 the channels double.

    The shortcut that 2.0 adds: channels 2c and 2c + 1 start as the upper and the lower row of channel c.
    """

    temporal_conv: nn.ModuleList | TemporalConv

    def __init__(self, channels: int, time: bool, config: KVAEConfig):
        super().__init__()
        self.doubles = config.downsample_version == 2
        self.padding = config.padding
        width = 2 * channels if self.doubles else channels
        self.spatial_conv = nn.Conv3d(channels, width, (1, 3, 3))
        if time and self.doubles:
            self.temporal_conv = nn.ModuleList(TemporalConv(width, taps=2) for _ in range(2))
        elif time:
            self.temporal_conv = TemporalConv(width, taps=3)
        self.linear = nn.Conv3d(width, width, 1)

    def compose(self) -> dict[str, Tensor]:
        space, space_bias = weights(self.spatial_conv)
        channels = space.shape[1]
        c = torch.arange(channels, device=space.device)
        mean = torch.zeros_like(space)  # over the 2x2 block, which is taps 1 and 2 of the window
        if self.doubles:
            mean[2 * c, c, 0, 1, 1:] = 0.5
            mean[2 * c + 1, c, 0, 2, 1:] = 0.5
        else:
            mean[c, c, 0, 1:, 1:] = 0.25
        space = space + mean
        linear, linear_bias = matrix(self.linear)
        if not hasattr(self, "temporal_conv"):
            return {"space": after(linear, space), "space_bias": linear @ space_bias + linear_bias}
        if isinstance(self.temporal_conv, TemporalConv):
            w, time_bias = weights(self.temporal_conv.conv)
            taps = list(w.flatten(2).unbind(2))
        else:
            # the second of the chain, which strides, sees two outputs of the first
            (w0, b0), (w1, b1) = (weights(held.conv) for held in self.temporal_conv)  # type: ignore[arg-type]
            w0, w1 = w0.flatten(2), w1.flatten(2)
            taps = [w1[..., 0] @ w0[..., 0], w1[..., 0] @ w0[..., 1] + w1[..., 1] @ w0[..., 0], w1[..., 1] @ w0[..., 1]]
            time_bias = w1.sum(2) @ b0 + b1
        half = 0.5 * torch.eye(len(linear), device=linear.device, dtype=linear.dtype)
        time = torch.stack([linear @ tap for tap in (taps[0], taps[1] + half, taps[2] + half)], dim=2)
        return {
            "space": space,
            "space_bias": space_bias,
            "time": time[..., None, None],
            "time_bias": linear @ time_bias + linear_bias,
        }

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C', T', H/2, W/2]; T' is (T + 1) / 2 at the start of a stream, T / 2 later on."""
        w = self.folded()
        x = self.halve_space(x_BCTHW, w)
        return self.halve_time(x, cache, w) if "time" in w else x

    def halve_space(self, x_BCTHW: Tensor, w: dict[str, Tensor], border: bool = True) -> Tensor:
        """[B, C, T, 2h, 2w] → [B, C', T, h, w]; without `border`, x has the row above already."""
        # rows and columns are even, so the last window ends on the last pixel: only before the first ones is padding
        x = framed(x_BCTHW, self.padding, (True, False, border, False), inside=2)  # reflected
        return conv3d(x, w["space"], w["space_bias"], stride=(1, 2, 2))

    def halve_time(self, x_BCTHW: Tensor, cache: Cache, w: dict[str, Tensor]) -> Tensor:
        """[B, C', T, h, w] → [B, C', T', h, w]."""
        x = remember(x_BCTHW, cache, self.name, memory=2, stride=2)
        return conv3d(x, w["time"], w["time_bias"], stride=(2, 1, 1))


class Upsample(Resampler):
    """Double rows and columns, and frames where `time`; the stream's first frame stays one frame."""

    def __init__(self, channels: int, time: bool, config: KVAEConfig):
        super().__init__()
        self.padding = config.padding
        self.spatial_conv = nn.Conv3d(channels, channels, (1, 3, 3))
        if time:
            self.temporal_conv = TemporalConv(channels, taps=3)
        self.linear = nn.Conv3d(channels, channels, 1)

    def compose(self) -> dict[str, Tensor]:
        space, bias = weights(self.spatial_conv)
        linear, linear_bias = matrix(self.linear)
        eye = torch.eye(len(linear), device=linear.device, dtype=linear.dtype)
        center = F.pad(eye[:, :, None, None, None], (1, 1, 1, 1))
        kernel = after(linear, space + center)
        # rows 2y − 1, 2y, 2y + 1 of the repeated image are rows y − 1, y, y of the small one; and 2y, 2y + 1, 2y + 2
        # are y, y, y + 1. A border repeated or of zeros is the same before and after, and so is a reflected one:
        # beyond the edge lies the edge's own twin.
        groups = (((0,), (1, 2)), ((0, 1), (2,)))
        composed = {"bias": linear @ bias + linear_bias}
        for row, column in PARITIES:
            taps = [kernel[:, :, :, list(rows)].sum(3, keepdim=True) for rows in groups[row]]
            taps = [tap[..., list(columns)].sum(4, keepdim=True) for tap in taps for columns in groups[column]]
            composed[f"space_{row}{column}"] = torch.cat([torch.cat(taps[:2], 4), torch.cat(taps[2:], 4)], 3)
        if hasattr(self, "temporal_conv"):
            time, composed["time_bias"] = weights(self.temporal_conv.conv)
            first, second, third = time.flatten(2).unbind(2)
            composed["time_0"] = torch.stack([first + second, third + eye], 2)[..., None, None]
            composed["time_1"] = torch.stack([first, second + third + eye], 2)[..., None, None]
        return composed

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C, T', 2H, 2W]; T' is 2T − 1 at the start of a stream, 2T later on."""
        w = self.folded()
        x = self.double_time(x_BCTHW, cache, w) if "time_0" in w else x_BCTHW
        return self.double_space(x, w)

    def double_space(self, x_BCTHW: Tensor, w: dict[str, Tensor], border: tuple[bool, bool] = (True, True)) -> Tensor:
        """[B, C, T, H, W] → [B, C, T, 2H, 2W]; where there is no border, x has the row above, or below, already."""
        x = framed(x_BCTHW, self.padding, (True, True, *border))
        B, C, T, H, W = x.shape
        y = like(x_BCTHW, (B, C, T, 2 * (H - 2), 2 * (W - 2)))
        for row, column in PARITIES:
            window = x[:, :, :, row : row + H - 1, column : column + W - 1]
            y[:, :, :, row::2, column::2] = conv3d(window, w[f"space_{row}{column}"], w["bias"])
        return y

    def double_time(self, x_BCTHW: Tensor, cache: Cache, w: dict[str, Tensor]) -> Tensor:
        """[B, C, T, H, W] → [B, C, T', H, W]."""
        start = int(self.name not in cache)  # the first frame has no even parity
        B, C, T, H, W = x_BCTHW.shape
        x = remember(x_BCTHW, cache, self.name, memory=1)
        y = like(x_BCTHW, (B, C, 2 * T - start, H, W))
        y[:, :, 1 - start :: 2] = conv3d(x, w["time_1"], w["time_bias"])
        if start < T:
            y[:, :, start::2] = conv3d(x[:, :, start:], w["time_0"], w["time_bias"])
        return y


def weights(conv: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """Weight [o, i, k, k, k] and bias [o], in at least float32: a fold in half precision would round twice."""
    assert conv.bias is not None
    return wide(conv.weight), wide(conv.bias)


def matrix(conv: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """Weight [o, i] and bias [o] of a 1x1x1 convolution."""
    weight, bias = weights(conv)
    return weight.flatten(1), bias


def after(linear_oi: Tensor, weight: Tensor) -> Tensor:
    """The kernel of a convolution followed by a 1x1x1 one."""
    return (linear_oi @ weight.flatten(1)).view(len(linear_oi), *weight.shape[1:])
