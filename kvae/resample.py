"""The resamplers of KVAE-3D, folded into fewer and smaller convolutions than the model defines.

As published, a downsampler adds strided convolutions to a mean over neighbours; an upsampler repeats neighbours and
adds convolutions of the result. A 1x1x1 convolution follows in both. All of this is linear, so it folds: downsampling
into one 3x3 convolution over space and one with three taps over time; upsampling into one 2x2 convolution of the small
picture for each of the four parities of the large one, and two taps for each of the two parities of time. This needs 2
to 2.5 times less arithmetic, and nothing large is repeated. Frozen weights are folded once, and after each change.

    # o output channels, i input channels, k taps; x_BCTHW
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KVAEConfig
from .engine.convolution import conv3d
from .engine.layout import empty_in_layout_of
from .layers import Cache, Streamed, pad_border, remember, wide

PARITIES = ((0, 0), (0, 1), (1, 0), (1, 1))


class Resampler(Streamed):
    """A resampler with its published weights. `compose` folds them; `folded` caches the result if they are frozen."""

    linear: nn.Conv3d

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, int]] = []  # the published weights that were folded, and their versions
        # weights made in inference mode have no version, so loading into them must unfold explicitly
        self.register_load_state_dict_post_hook(_unfold)

    def compose(self) -> dict[str, Tensor]:
        """Fold the published weights, in at least float32."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The weights to run with: the cached ones, refolded if the published ones have changed.

        Weights that require gradients are folded in every run, so that gradients reach them; so are all weights while a
        graph is captured.
        """
        if not self._frozen or torch.compiler.is_compiling():
            return {name: tensor.to(self.linear.weight.dtype) for name, tensor in self.compose().items()}
        self.fold()
        return {name.removeprefix("folded_"): buffer for name, buffer in self.named_buffers()}

    def fold(self) -> None:
        """Cache the folded weights if the published ones are frozen. They are not part of the state dict."""
        if not self._frozen or self._is_current():
            return
        self.unfold()
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self.compose().items():
                self.register_buffer(f"folded_{name}", tensor.to(self.linear.weight.dtype, copy=True), persistent=False)
        self._note_versions()

    def unfold(self) -> None:
        """Drop the folded weights."""
        self._seen = []
        for name, _ in list(self.named_buffers()):
            delattr(self, name)

    @property
    def _frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def _note_versions(self) -> None:
        self._seen = [(parameter.detach(), version(parameter)) for parameter in self.parameters()]

    def _is_current(self) -> bool:
        """Whether the published weights are those that were folded: in the same memory, and not written to since."""
        return bool(self._seen) and all(
            (parameter.data_ptr(), parameter.dtype, version(parameter)) == (seen.data_ptr(), seen.dtype, then)
            for parameter, (seen, then) in zip(self.parameters(), self._seen, strict=True)
        )

    def _apply(self, fn, recurse=True):
        """Move the folded weights along. If the dtype changes, drop them, to fold the converted ones."""
        current, dtype = self._is_current(), self.linear.weight.dtype
        super()._apply(fn, recurse)
        if current and self.linear.weight.dtype == dtype:
            self._note_versions()
        else:
            self.unfold()
        return self


def version(parameter: Tensor) -> int:
    """How often autograd saw a write to a weight; 0 for weights made in inference mode, which have no such count."""
    return 0 if parameter.is_inference() else parameter._version


def _unfold(resampler: Resampler, _: object) -> None:
    resampler.unfold()


class TemporalConv(nn.Module):
    """The weights of a convolution over time, under the checkpoint's name. They only run folded."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (taps, 1, 1))


class Downsample(Resampler):
    """Halve rows and columns, and frames if `time`. In 2.0 the channels double.

    2.0 adds a shortcut: channels 2c and 2c + 1 are the means of the upper and of the lower row of channel c.
    """

    temporal_conv: nn.ModuleList | TemporalConv

    def __init__(self, channels: int, time: bool, config: KVAEConfig):
        super().__init__()
        self.halves_time = time
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
        space, space_bias = conv_weights(self.spatial_conv)
        channels = space.shape[1]
        c = torch.arange(channels, device=space.device)
        mean = torch.zeros_like(space)  # over the 2x2 block, which is taps 1 and 2 of the 3x3 window
        if self.doubles:
            mean[2 * c, c, 0, 1, 1:] = 0.5
            mean[2 * c + 1, c, 0, 2, 1:] = 0.5
        else:
            mean[c, c, 0, 1:, 1:] = 0.25
        space = space + mean
        linear, linear_bias = pointwise_matrix(self.linear)
        if not self.halves_time:
            return {"space": then_pointwise(linear, space), "space_bias": linear @ space_bias + linear_bias}
        if isinstance(self.temporal_conv, TemporalConv):
            w, time_bias = conv_weights(self.temporal_conv.conv)
            taps = list(w.flatten(2).unbind(2))
        else:
            # the second convolution of the chain, which has the stride, reads two outputs of the first
            (w0, b0), (w1, b1) = (conv_weights(each.conv) for each in self.temporal_conv)  # type: ignore[arg-type]
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
        return self.halve_time(x, cache, w) if self.halves_time else x

    def halve_space(self, x_BCTHW: Tensor, w: dict[str, Tensor], border: bool = True) -> Tensor:
        """[B, C, T, 2h, 2w] → [B, C', T, h, w]; without `border`, x already has the row above."""
        # rows and columns are even, so the last window ends on the last pixel: only the first needs padding
        x = pad_border(x_BCTHW, self.padding, (True, False, border, False), inside=2)  # reflected
        return conv3d(x, w["space"], w["space_bias"], stride=(1, 2, 2))

    def halve_time(self, x_BCTHW: Tensor, cache: Cache, w: dict[str, Tensor]) -> Tensor:
        """[B, C', T, h, w] → [B, C', T', h, w]."""
        x = remember(x_BCTHW, cache, self.name, memory=2, stride=2)
        return conv3d(x, w["time"], w["time_bias"], stride=(2, 1, 1))


class Upsample(Resampler):
    """Double rows and columns, and frames if `time`; the stream's first frame stays one frame."""

    def __init__(self, channels: int, time: bool, config: KVAEConfig):
        super().__init__()
        self.doubles_time = time
        self.padding = config.padding
        self.spatial_conv = nn.Conv3d(channels, channels, (1, 3, 3))
        if time:
            self.temporal_conv = TemporalConv(channels, taps=3)
        self.linear = nn.Conv3d(channels, channels, 1)

    def compose(self) -> dict[str, Tensor]:
        space, bias = conv_weights(self.spatial_conv)
        linear, linear_bias = pointwise_matrix(self.linear)
        eye = torch.eye(len(linear), device=linear.device, dtype=linear.dtype)
        center = F.pad(eye[:, :, None, None, None], (1, 1, 1, 1))
        kernel = then_pointwise(linear, space + center)
        # rows 2y − 1, 2y, 2y + 1 of the repeated picture are rows y − 1, y, y of the small one; rows 2y, 2y + 1, 2y + 2
        # are y, y, y + 1. The border is the same before and after repetition, whether it is of zeros, replicated or
        # reflected: the row inside the edge is a copy of the edge.
        groups = (((0,), (1, 2)), ((0, 1), (2,)))
        composed = {"bias": linear @ bias + linear_bias}
        for row, column in PARITIES:
            taps = [kernel[:, :, :, list(rows)].sum(3, keepdim=True) for rows in groups[row]]
            taps = [tap[..., list(columns)].sum(4, keepdim=True) for tap in taps for columns in groups[column]]
            composed[f"space_{row}{column}"] = torch.cat([torch.cat(taps[:2], 4), torch.cat(taps[2:], 4)], 3)
        if self.doubles_time:
            time, composed["time_bias"] = conv_weights(self.temporal_conv.conv)
            first, second, third = time.flatten(2).unbind(2)
            composed["time_0"] = torch.stack([first + second, third + eye], 2)[..., None, None]
            composed["time_1"] = torch.stack([first, second + third + eye], 2)[..., None, None]
        return composed

    def forward(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        """[B, C, T, H, W] → [B, C, T', 2H, 2W]; T' is 2T − 1 at the start of a stream, 2T later on."""
        w = self.folded()
        x = self.double_time(x_BCTHW, cache, w) if self.doubles_time else x_BCTHW
        return self.double_space(x, w)

    def double_space(self, x_BCTHW: Tensor, w: dict[str, Tensor], border: tuple[bool, bool] = (True, True)) -> Tensor:
        """[B, C, T, H, W] → [B, C, T, 2H, 2W]; without a `border` (top, bottom), x already has that row."""
        x = pad_border(x_BCTHW, self.padding, (True, True, *border))
        B, C, T, H, W = x.shape
        y = empty_in_layout_of(x_BCTHW, (B, C, T, 2 * (H - 2), 2 * (W - 2)))
        for row, column in PARITIES:
            window = x[:, :, :, row : row + H - 1, column : column + W - 1]
            y[:, :, :, row::2, column::2] = conv3d(window, w[f"space_{row}{column}"], w["bias"])
        return y

    def double_time(self, x_BCTHW: Tensor, cache: Cache, w: dict[str, Tensor]) -> Tensor:
        """[B, C, T, H, W] → [B, C, T', H, W]."""
        start = int(self.name not in cache)  # the stream's first frame is not doubled
        B, C, T, H, W = x_BCTHW.shape
        x = remember(x_BCTHW, cache, self.name, memory=1)
        y = empty_in_layout_of(x_BCTHW, (B, C, 2 * T - start, H, W))
        y[:, :, 1 - start :: 2] = conv3d(x, w["time_1"], w["time_bias"])
        if start < T:
            y[:, :, start::2] = conv3d(x[:, :, start:], w["time_0"], w["time_bias"])
        return y


def conv_weights(conv: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """Weight [o, i, k, k, k] and bias [o] in at least float32, since a fold in half precision would round twice."""
    assert conv.bias is not None
    return wide(conv.weight), wide(conv.bias)


def pointwise_matrix(conv: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """Weight [o, i] and bias [o] of a 1x1x1 convolution."""
    weight, bias = conv_weights(conv)
    return weight.flatten(1), bias


def then_pointwise(linear_oi: Tensor, weight: Tensor) -> Tensor:
    """The kernel of a convolution that a 1x1x1 convolution follows."""
    return (linear_oi @ weight.flatten(1)).view(len(linear_oi), *weight.shape[1:])
