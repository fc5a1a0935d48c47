"""Adapters measured in latents: squared errors, absolute and relative to the variance of the target.

# z_h, z_k: latents of a pair, [1, c, t, h, w]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import LatentAdapter
from ..data.dataset import Pairs
from ..data.pairs import Pair
from ..directions import DIRECTIONS
from ..errors import UserError
from .spectrum import Spectrum

Map = Callable[[Tensor], Tensor]
ARROWS = tuple(each.arrow for each in DIRECTIONS.values())
WORST_CLIPS = 5


@torch.inference_mode()
def latent_metrics(
    pairs: Pairs, h2k: LatentAdapter, k2h: LatentAdapter, affine: Callable[[int, str], Map] | None
) -> dict[str, Any]:
    """Measure both adapters, both cycles and the affine maps on pairs.

    Args:
        affine: returns the affine map for a pair's number and a direction, "h2k" or "k2h"; None leaves the maps out.

    Returns:
        pairs: their number.
        figures: "mse" over the pairs, and "share": the MSE relative to the target's variance around each channel's
            mean; by direction, cycle and affine map.
        worst: the clips with the largest errors, by direction.
        channels: mean and standard deviation of every channel of z_h and z_k, and each adapter's relative MSE in them.
        spectrum: each adapter's relative MSE by spatial frequency, see `Spectrum`.

    Raises:
        UserError: the channels or grids of a pair are not those of the adapters.
    """
    device = next(h2k.parameters()).device
    errors: dict[str, list[float]] = {}
    by_channel: dict[str, Tensor] = dict.fromkeys(ARROWS, torch.zeros(()).double())
    moments = {"z_h": Moments(), "z_k": Moments()}
    spectra = {name: Spectrum() for name in ARROWS}
    for i in range(len(pairs)):
        check_channels(pairs.name(i), pairs[i], h2k)
        z_h, z_k = pairs.batch([i], device)
        maps = {name: affine(i, name) for name in DIRECTIONS} if affine else {}
        found = _mapped(z_h, z_k, h2k, k2h, maps)
        for name, (z, target) in found.items():
            errors.setdefault(name, []).append((z - target).square().mean().item())
            if name in ARROWS:
                by_channel[name] = by_channel[name] + (z - target).cpu().double().square().mean((0, 2, 3, 4))
                spectra[name].add(z - target, target)
        moments["z_h"].add(z_h)
        moments["z_k"].add(z_k)
    variance = {space: max(1e-12, each.variance().mean().item()) for space, each in moments.items()}
    return {
        "pairs": len(pairs),
        "figures": {name: _mean_errors(each, variance[_target(name)]) for name, each in errors.items()},
        "worst": {name: _worst_clips(pairs, errors[name], variance[_target(name)]) for name in ARROWS},
        "channels": _channels(moments, {name: each / len(pairs) for name, each in by_channel.items()}),
        "spectrum": {name: each.shares() for name, each in spectra.items()},
    }


def _mapped(
    z_h: Tensor, z_k: Tensor, h2k: LatentAdapter, k2h: LatentAdapter, maps: dict[str, Map]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The latents that each direction, cycle and affine map gives for a pair, and their target, by the map's name."""
    k_hat, h_hat = h2k(z_h), k2h(z_k)
    found = {"H→K": (k_hat, z_k), "K→H": (h_hat, z_h), "H→K→H": (k2h(k_hat), z_h), "K→H→K": (h2k(h_hat), z_k)}
    for name, affine in maps.items():
        source, target = DIRECTIONS[name].ordered(z_h, z_k)
        found[f"{DIRECTIONS[name].arrow} affine"] = affine(source), target
    return found


def check_channels(name: str, pair: Pair, h2k: LatentAdapter) -> None:
    """Refuse a pair whose channels or grids are not those of the adapter's spaces.

    Raises:
        UserError: they differ; the message names the pair.
    """
    h, k, (of_h, of_k) = h2k.source, h2k.target, h2k.ratios
    if (len(pair.z_h), len(pair.z_k)) != (h.channels, k.channels):
        raise UserError(
            f"{name}: {len(pair.z_h)} and {len(pair.z_k)} channels; expected {h.channels} ({h.name}) and {k.channels} "
            f"({k.name})"
        )
    rows_h, rows_k = pair.z_h.shape[2], pair.z_k.shape[2]
    if rows_h * of_k != rows_k * of_h:
        raise UserError(f"{name}: {rows_h} and {rows_k} rows; expected {of_h} of {h.name} for {of_k} of {k.name}")


class Moments:
    """Mean and variance of every channel, float64 [c], over clips. Each clip counts the same, whatever its size."""

    def __init__(self) -> None:
        self.clips = 0
        self.sum = self.sum_squares = torch.zeros(()).double()

    def add(self, z_Bcthw: Tensor) -> None:
        """Add a clip, [1, c, t, h, w]."""
        z = z_Bcthw.cpu().double()  # on the CPU, since Apple's GPUs have no float64
        self.clips += 1
        self.sum = self.sum + z.mean((0, 2, 3, 4))
        self.sum_squares = self.sum_squares + z.square().mean((0, 2, 3, 4))

    def mean(self) -> Tensor:
        return self.sum / self.clips

    def variance(self) -> Tensor:
        return self.sum_squares / self.clips - self.mean().square()


def _target(name: str) -> str:
    """The latents that a direction, a cycle or an affine map ends at."""
    return "z_k" if name.removesuffix(" affine").endswith("K") else "z_h"


def _mean_errors(errors: list[float], variance: float) -> dict[str, float]:
    mse = sum(errors) / len(errors)
    return {"mse": mse, "share": mse / variance}


def _worst_clips(pairs: Pairs, errors: list[float], variance: float) -> list[dict[str, Any]]:
    order = sorted(range(len(errors)), key=lambda i: -errors[i])[:WORST_CLIPS]
    return [{"clip": pairs.name(i), "mse": errors[i], "share": errors[i] / variance} for i in order]


def _channels(moments: dict[str, Moments], mse: dict[str, Tensor]) -> dict[str, list[float]]:
    channels = {}
    for space, each in moments.items():
        channels[f"{space} mean"] = each.mean().tolist()
        channels[f"{space} std"] = each.variance().clamp(min=0).sqrt().tolist()
    for name, errors in mse.items():
        channels[f"{name} share"] = (errors / moments[_target(name)].variance().clamp(min=1e-12)).tolist()
    return channels
