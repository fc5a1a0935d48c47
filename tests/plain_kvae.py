"""A plain KVAE-3D: the whole clip at once, no caches, no folding, one formula for each layer.

A reference for tests, written from the published description, independently of the package. Weights come as a state
dict; `config` is a KVAEConfig. It supports models with RMS norm only, which have no segments.
"""

import torch
import torch.nn.functional as F


def conv(state, name, x, stride=(1, 1, 1)):
    return F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride)


def causal(state, name, x, config, stride=1):
    """Convolve after kernel − 1 copies of the first frame; a 3x3 kernel also gets a border of one pixel."""
    time, height, _ = state[f"{name}.conv.weight"].shape[2:]
    x = torch.cat([x[:, :, :1]] * (time - 1) + [x], dim=2)
    if height == 3:
        x = border(x, config, "replicate")
    return conv(state, f"{name}.conv", x, (stride, 1, 1))


def border(x, config, mode):
    return F.pad(x, (1, 1, 1, 1, 0, 0), mode="constant" if config.padding == "zeros" else mode)


def rms(state, name, x):
    return x / x.square().mean(1, keepdim=True).sqrt() * state[f"{name}.gamma"]


def spatial_norm(state, name, x, z):
    """Two 1x1x1 convolutions of the latent, repeated to x's size; the first latent covers one frame only."""
    first = F.interpolate(z[:, :, :1], size=(1, *x.shape[3:]), mode="nearest")
    if z.shape[2] > 1:
        rest = F.interpolate(z[:, :, 1:], size=(x.shape[2] - 1, *x.shape[3:]), mode="nearest")
        first = torch.cat([first, rest], dim=2)
    return rms(state, f"{name}.norm_layer", x) * conv(state, f"{name}.conv_y", first) + conv(
        state, f"{name}.conv_b", first
    )


def resnet(state, name, x, config, z=None):
    h = x
    for i in (1, 2):
        h = rms(state, f"{name}.norm{i}", h) if z is None else spatial_norm(state, f"{name}.norm{i}", h, z)
        h = causal(state, f"{name}.conv{i}", F.silu(h), config)
    return h + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def downsample(state, name, x, config):
    """PixelUnshuffle, then the mean over neighbouring pairs of its channels; a chain of two convolutions over time."""
    frames = x.transpose(1, 2).flatten(0, 1)
    shuffled = F.pixel_unshuffle(frames, 2).unflatten(1, (-1, 2)).mean(2)
    mean = shuffled.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    x = mean + conv(state, f"{name}.spatial_conv", border(x, config, "reflect"), (1, 2, 2))
    if f"{name}.temporal_conv.0.conv.weight" in state:
        pairs = [x[:, :, :1]] + [x[:, :, i : i + 2].mean(2, keepdim=True) for i in range(1, x.shape[2], 2)]
        h = causal(state, f"{name}.temporal_conv.0", x, config)
        x = causal(state, f"{name}.temporal_conv.1", h, config, stride=2) + torch.cat(pairs, dim=2)
    return conv(state, f"{name}.linear", x)


def upsample(state, name, x, config):
    if f"{name}.temporal_conv.conv.weight" in state:
        x = x.repeat_interleave(2, dim=2)[:, :, 1:]
        x = x + causal(state, f"{name}.temporal_conv", x, config)
    x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    x = x + conv(state, f"{name}.spatial_conv", border(x, config, "reflect"))
    return conv(state, f"{name}.linear", x)


def encode(state, config, x):
    """[B, 3, T, H, W], T = 4n + 1 → mean and logvar, [B, 2c, t, h, w]."""
    h = causal(state, "encoder.conv_in", x, config)
    for level in range(len(config.encoder_widths)):
        for block in range(config.num_res_blocks):
            h = resnet(state, f"encoder.down.{level}.block.{block}", h, config)
        if level < len(config.encoder_widths) - 1:
            h = downsample(state, f"encoder.down.{level}.downsample", h, config)
    for block in ("block_1", "block_2"):
        h = resnet(state, f"encoder.mid.{block}", h, config)
    return causal(state, "encoder.conv_out", F.silu(rms(state, "encoder.norm_out", h)), config)


def decode(state, config, z):
    """[B, c, t, h, w] → [B, 3, T, H, W]."""
    h = causal(state, "decoder.conv_in", z, config)
    for block in ("block_1", "block_2"):
        h = resnet(state, f"decoder.mid.{block}", h, config, z)
    for level in reversed(range(len(config.decoder_widths))):
        for block in range(config.num_res_blocks + 1):
            h = resnet(state, f"decoder.up.{level}.block.{block}", h, config, z)
        if level:
            h = upsample(state, f"decoder.up.{level}.upsample", h, config)
    return causal(state, "decoder.conv_out", F.silu(spatial_norm(state, "decoder.norm_out", h, z)), config)
