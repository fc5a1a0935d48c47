"""Affine maps in closed form, both ways: what training starts from, and what every adapter is compared with."""

from __future__ import annotations

from tqdm import tqdm

from ..adapters.ridge import Ridge
from .dataset import Pairs
from .errors import UserError

FIT_PAIRS = 4096  # 44 million positions at 240x320, for maps of 433 unknowns a channel


def fit_both_ways(pairs: Pairs, device: str, kernel: int = 3) -> dict[str, Ridge]:
    """The fits "h2k" and "k2h", with the statistics they gather, of at most FIT_PAIRS of the pairs, evenly spread.

    Raises:
        UserError: a pair has other channels than those before it.
    """
    fits: dict[str, Ridge] = {}
    some = pairs.spread(FIT_PAIRS)
    for i, pair in enumerate(tqdm(some, desc="closed form", total=len(some), leave=False, disable=None)):
        h, k = len(pair.z_h), len(pair.z_k)
        fits = fits or {"h2k": Ridge(h, k, kernel), "k2h": Ridge(k, h, kernel)}
        if (h, k) != (fits["h2k"].in_channels, fits["h2k"].out_channels):
            raise UserError(f"{some.name(i)}: {h} and {k} channels; the pairs before had others")
        z_h, z_k = pair.z_h[None].to(device), pair.z_k[None].to(device)
        fits["h2k"].add(z_h, z_k)
        fits["k2h"].add(z_k, z_h)
    return fits
