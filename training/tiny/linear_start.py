"""A new small VAE of HunyuanVideo 1.5 as a near-linear codec: it starts where principal components of blocks end.

Its resamplers move pixels between space and channels, with a shortcut around each. So they can be a cascade of block
transforms: each downsampler keeps the principal components of every 2x2 or 2x2x2 block of the level above, and each
upsampler puts them back. Next to a large constant channel, norms and SiLU are close to linear. The latents are
principal components in a random rotation.

The resamplers treat a clip's first frame in another way. One latent channel and one channel of the decoder's levels
flag it; one residual block before each upsampler of time, open at the flag only, rearranges it. All other residual
branches start at zero.

# C channels of a level, m those that each position has in the next: m - 1 components, and a constant
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .components import principal_axes

CONSTANT = 4.0  # of the constant channels, and of the flag; components are of the size of colours
LAST_CONSTANT = 12.0  # before the decoder's last norm
OPEN = 12.0  # by how much the flag opens a gate, in units of a normed channel
SMALL = 0.2  # gamma of a norm, so that the SiLU behind it is close to linear
COLOURS = 3
FLAG = 15  # a channel of the decoder's levels that would be constant
RIDGE = 1e-7  # of the fits, as a share of the mean variance
SMALLEST = 1e-2  # singular value that is inverted, as a share of the largest


@dataclass
class Features:
    """The channels of a level for the sample clips, and what they mean."""

    x_BCTHW: Tensor
    signal_C: Tensor  # bool: the components; the rest are constant or unused
    positions: int  # of the level above, whose components lie side by side in the channels


@torch.no_grad()
def start_linear(vae: Any, x_B3THW: Tensor, logvar: float) -> None:
    """Set the weights of a new AutoencoderKLHunyuanVideo15. PyTorch's generator decides the rotation of the latents.

    Args:
        x_B3THW: sample clips in −1..1, of at least 5 frames; the sides are multiples of 16.
        logvar: the log-variance of the posterior, everywhere.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for name, module in vae.named_modules():
        if name.endswith((".conv2.conv", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    with x_B3THW.device:  # of everything that is made here
        levels = [_colours_in(encoder.conv_in, x_B3THW)]
        ups = [block.upsamplers[0] for block in decoder.up_blocks[:-1]]
        for down, up in zip(encoder.down_blocks[:-1], ups[::-1], strict=True):
            levels.append(_transform(down.downsamplers[0], up, levels[-1]))
        z = _latents_out(encoder, levels[-1], logvar)
        _latents_in(decoder, z, levels[-1])
        _rearrange_first(decoder, z, levels[2].x_BCTHW[:, :, :1])
        _colours_out(decoder)


def _colours_in(conv_in: Any, x_B3THW: Tensor) -> Features:
    """The first channels are the colours, the next is constant, the others stay random filters."""
    weight, bias = conv_in.conv.weight, conv_in.conv.bias
    weight[: COLOURS + 1] = 0
    weight[:COLOURS, :, 2, 1, 1] = torch.eye(COLOURS)
    bias[:COLOURS], bias[COLOURS] = 0, CONSTANT
    return Features(conv_in(x_B3THW), torch.arange(len(bias)) < COLOURS, 1)


def _transform(down: Any, up: Any, level: Features) -> Features:
    """Set a downsampler to keep the principal components of a level, and the upsampler that leads back to it."""
    signal, C = level.signal_C, len(level.signal_C)
    m, factor = len(down.conv.conv.bias), 8 if down.add_temporal_downsample else 4
    mean, _, axes = principal_axes([level.x_BCTHW[:, signal, 1:].movedim(1, -1).flatten(0, -2)], m - 1)
    axes_Cm, mean_C, scale = torch.zeros(C, m), torch.zeros(C), level.positions**-0.5
    axes_Cm[signal, : m - 1], mean_C[signal] = axes, mean

    shortcut = torch.eye(m).repeat_interleave(C // m, 0)
    _set_center(down.conv, scale * axes_Cm.T - shortcut.T * (m / C), -scale * axes_Cm.T @ mean_C)
    down.conv.conv.bias[-1] = CONSTANT

    lift, constant = axes_Cm / scale, mean_C + CONSTANT * ~signal
    if level.positions == 1:  # colours also negated, since silu(x) - silu(-x) = x
        lift[COLOURS : 2 * COLOURS], constant[COLOURS:] = -lift[:COLOURS], 0
        constant[COLOURS : 2 * COLOURS], constant[2 * COLOURS] = -constant[:COLOURS], LAST_CONSTANT
    lifts = torch.block_diag(*[lift - shortcut] * factor)
    if up.add_temporal_upsample:
        lifts[FLAG::C, FLAG], constant[FLAG] = 1, 0
    _set_center(up.conv, lifts, constant.repeat(factor))
    return Features(down(level.x_BCTHW), (torch.arange(m) < m - 1).repeat(factor), factor)


def _latents_out(encoder: Any, level: Features, logvar: float) -> Tensor:
    """Set the encoder's last convolution; return the means, [B, c, t, h, w]."""
    h = level.x_BCTHW
    count = encoder.out_channels // 2
    h_signal = h[:, level.signal_C].movedim(1, -1)
    mean, variances, axes = principal_axes([h_signal[:, 1:].flatten(0, -2)], count - 1)
    axes = axes / variances**0.25 / variances.sqrt().mean().sqrt()  # halfway to whitening: loud components stay loud
    z = F.pad(((h_signal - mean) @ axes).movedim(-1, 1), (0, 0, 0, 0, 0, 0, 0, 1))
    shortcut = h.unflatten(1, (-1, encoder.group_size)).mean(2)
    encoder.norm_out.gamma.fill_(SMALL)
    features = F.silu(encoder.norm_out(h))

    def fitted(z: Tensor, first: int) -> Tensor:
        target = torch.cat([z, torch.full_like(z, logvar)], dim=1)
        _fit(encoder.conv_out, features, target - shortcut, first, center=True)
        return (encoder.conv_out(features) + shortcut)[:, :count]

    z = fitted(z, first=1)
    z[:, -1] = 0
    z[:, -1, 0] = 2
    rotation = nn.init.orthogonal_(torch.empty(count, count))
    return fitted((z.movedim(1, -1) @ rotation).movedim(-1, 1), first=0)


def _latents_in(decoder: Any, z_Bcthw: Tensor, level: Features) -> None:
    """Set the decoder's first convolution to lead back to a level, and to flag the first latents of clips."""
    shortcut = z_Bcthw.repeat_interleave(decoder.repeat, dim=1)
    _fit(decoder.conv_in, z_Bcthw, level.x_BCTHW - shortcut, first=1)
    h = decoder.conv_in(z_Bcthw)
    h[:, FLAG] = -shortcut[:, FLAG]
    h[:, FLAG, 0] += CONSTANT
    _fit(decoder.conv_in, z_Bcthw, h, first=0)


def _rearrange_first(decoder: Any, z_Bcthw: Tensor, wanted_BC1HW: Tensor) -> None:
    """Set a residual block before each upsampler of time, so that the first frame becomes the wanted level 2."""
    early, late = decoder.mid_block.resnets[0], decoder.up_blocks[1].resnets[0]
    up, last = (block.upsamplers[0] for block in decoder.up_blocks[:2])
    h = decoder.conv_in(z_Bcthw) + z_Bcthw.repeat_interleave(decoder.repeat, dim=1)
    middle = _before(last, wanted_BC1HW)
    _open_at_flag(early, h, _before(up, middle))
    _open_at_flag(late, up(early(h)), middle)


def _before(up: Any, y_BC1HW: Tensor) -> Tensor:
    """The channels that an upsampler turns into the first frame y, as nearly as it can."""
    C = up.conv.conv.weight.shape[1]
    basis = torch.cat([torch.zeros(1, C), torch.eye(C)])[..., None, None, None]
    outputs = up(basis).flatten(1)  # [1 + C, channels, 2, 2]
    matrix, offset = outputs[1:] - outputs[0], outputs[0]
    H, W = y_BC1HW.shape[3:]
    y = y_BC1HW.unflatten(4, (W // 2, 2)).unflatten(3, (H // 2, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
    return ((y - offset) @ torch.linalg.pinv(matrix.cpu(), rtol=SMALLEST).to(matrix)).movedim(-1, 1)


def _open_at_flag(block: Any, h_BCTHW: Tensor, first_BC1HW: Tensor) -> None:
    """Set a residual block to turn the flagged first frame of h into another, and to leave the other frames alone."""
    C = h_BCTHW.shape[1]
    block.norm1.gamma.fill_(SMALL)
    x = F.silu(block.norm1(h_BCTHW))
    closed, opened = x[:, FLAG, 1:].mean(), x[:, FLAG, :1].mean()
    gate = torch.eye(C) * (2 / SMALL)  # as silu(x) is about x / 2
    gate[:, FLAG] += 2 * OPEN / (opened - closed)
    _set_center(block.conv1, gate, -OPEN - gate[:, FLAG] * closed)
    block.norm2.gamma.fill_(OPEN / 2)
    features = F.silu(block.norm2(block.conv1(x)))
    target = torch.zeros_like(h_BCTHW)
    target[:, :, :1] = first_BC1HW - h_BCTHW[:, :, :1]
    _fit(block.conv2, features, target, first=0, center=True)


def _colours_out(decoder: Any) -> None:
    """Set the decoder's last convolution to give the colours that `_transform` laid out for it."""
    colours = torch.randn(1000, COLOURS, 1, 1, 1) * 0.5
    h = torch.zeros(len(colours), len(decoder.norm_out.gamma), 1, 1, 1)
    h[:, : 2 * COLOURS], h[:, 2 * COLOURS] = torch.cat([colours, -colours], dim=1), LAST_CONSTANT
    _fit(decoder.conv_out, F.silu(decoder.norm_out(h)), colours, first=0, center=True)


def _set_center(conv: Any, matrix: Tensor, bias: Tensor) -> None:
    """Make a causal convolution a matrix [o, i] at every position."""
    conv.conv.weight.zero_()
    conv.conv.weight[:, :, 2, 1, 1] = matrix
    conv.conv.bias.copy_(bias)


def _fit(conv: Any, x_BCTHW: Tensor, y_BCTHW: Tensor, first: int, center: bool = False) -> None:
    """Set a causal convolution to map x to y, by least squares over the frames from `first` on.

    Args:
        center: whether only the tap at the position itself is used.
    """
    if center:
        taps = x_BCTHW[..., None]
    else:
        padded = F.pad(x_BCTHW, conv.time_causal_padding, mode=conv.pad_mode)
        taps = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).flatten(5)
    x = taps[:, :, first:].movedim(1, -2).flatten(0, 3).flatten(1).cpu().double()  # Apple's GPUs have no float64
    y = y_BCTHW[:, :, first:].movedim(1, -1).flatten(0, 3).cpu().double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    square = (x - x_mean).T @ (x - x_mean)
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), device="cpu")
    solution = torch.linalg.solve(square, (x - x_mean).T @ (y - y_mean)).T
    if center:
        _set_center(conv, solution, y_mean - solution @ x_mean)
    else:
        conv.conv.weight.copy_(solution.view_as(conv.conv.weight))
        conv.conv.bias.copy_(y_mean - solution @ x_mean)
