"""Judge a network of the toy by what no loss sees: where the sprites truly are, and what they truly look like.

found = judge(network, embedder)        # [held-out sprites, METRICS]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.toy.base import SHIFT
from kvae_comfyui.benchmarks.toy.world import NEW, SHAPE, Sprites, conditions, decode, sprites
from kvae_comfyui.training.vfl.conditions import flow
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.identity import Embedder
from kvae_comfyui.training.vfl.path import euler, noise, sigmas

STEPS = 8  # N
HELD_OUT = 96
METRICS = ("place", "tones", "change", "pixels", "path", "off", "head")
SEEN = 0.1  # summed over the channels: where a picture differs from its background by less, no sprite is seen


@torch.no_grad()
def judge(network: Any, embedder: Embedder, domain: str = NEW) -> Tensor:
    """[HELD_OUT, METRICS] of clips that the network makes, each from its own noise, the same for all networks."""
    held_out = sprites(HELD_OUT, domain, Draws("held out", domain))
    y = generate(network, held_out, noise(0, 0, (HELD_OUT, *SHAPE)), sigmas(STEPS, SHIFT))
    return metrics(y, held_out, embedder)


@torch.no_grad()
def generate(network: Any, shown: Sprites, x_Bcthw: Tensor, sigma: Tensor) -> Tensor:
    """y_B3THW that a network makes of the first frames."""
    given = conditions(shown.clips()[:, :, 0], shown.step_B2)
    for i in range(len(sigma) - 1):
        x_Bcthw = euler(x_Bcthw, flow(network, given, x_Bcthw, sigma[i]), sigma, i)
    return decode(x_Bcthw)


def metrics(y_B3THW: Tensor, shown: Sprites, embedder: Embedder) -> Tensor:
    """What clips are worth, [B, METRICS]; the first frame is given, and does not count.

    Returns:
        place: squared error of the pixels where the sprite truly is; tones: of the mean of each tone there; change:
        mean |change| from frame to frame; pixels: squared error of all; path: length of the way of what differs from
        the background, divided by the true one; off: squared error where the sprite truly is not; head: the identity
        loss of all frames, which is no judge, but what a loss has seen.
    """
    true, mask = shown.clips(), shown.masks()[:, None, 1:]
    error = (y_B3THW - true)[:, :, 1:].square()
    tones = []
    for each in shown.tone_masks():
        part = each[:, None, 1:]
        mean = (y_B3THW[:, :, 1:] * part).sum((3, 4)) / part.sum((3, 4))
        tones.append((mean - (true[:, :, 1:] * part).sum((3, 4)) / part.sum((3, 4))).square().mean((1, 2)))
    first, *after = (embedder(frame) for frame in torch.cat([true[:, :, :1], y_B3THW[:, :, 1:]], 2).unbind(2))
    found = {
        "place": _mean(error, mask),
        "tones": torch.stack(tones).mean(0),
        "change": y_B3THW.diff(dim=2).abs().mean((1, 2, 3, 4)),
        "pixels": error.mean((1, 2, 3, 4)),
        "path": way(y_B3THW, shown) / way(true, shown),
        "off": _mean(error, ~mask),
        "head": torch.stack([1 - (e * first).sum(1) for e in after]).mean(0),
    }
    return torch.stack([found[name] for name in METRICS], 1)


def way(y_B3THW: Tensor, shown: Sprites) -> Tensor:
    """How far in pixels [B] the centre of what differs from the background moves, frame by frame."""
    weight = (y_B3THW - shown.ground_B3[:, :, None, None, None]).abs().sum(1)
    weight = weight * (weight > SEEN)
    at = torch.arange(weight.shape[-1]).float()
    total = weight.sum((2, 3)).clamp_min(1e-6)
    centre = torch.stack([(weight.sum(3) * at).sum(2) / total, (weight.sum(2) * at).sum(2) / total], 2)
    return centre.diff(dim=1).norm(dim=2).sum(1)


def _mean(error_B3THW: Tensor, mask_B1THW: Tensor) -> Tensor:
    return (error_B3THW * mask_B1THW).sum((1, 2, 3, 4)) / (3 * mask_B1THW.sum((1, 2, 3, 4)))
