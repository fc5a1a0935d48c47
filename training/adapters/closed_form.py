"""Closed-form affine maps in both directions: the start of training, and the baseline of every adapter."""

from __future__ import annotations

from tqdm import tqdm

from ...adapters.adapter import LatentAdapter
from ...adapters.shuffle import on_one_grid
from ...adapters.spaces import LatentSpace
from ..data.dataset import Pairs
from ..directions import DIRECTIONS
from ..errors import UserError
from ..runtime.processes import Processes
from ..runtime.stages import hidden
from .ridge import Ridge

FIT_PAIRS = 4096  # 44 million positions at 240x320, for maps of 433 unknowns per channel


def fit_both_ways(pairs: Pairs, device: str, kernel: int = 3, processes: Processes | None = None) -> dict[str, Ridge]:
    """Fit both directions, "h2k" and "k2h", to at most FIT_PAIRS of the pairs, evenly spread, each on one grid.

    Args:
        device: where products within a clip are computed.
        kernel: of the affine maps, 1 or 3.
        processes: they share the pairs, and each gets the fits of all pairs; None for this process alone.

    Returns:
        The fits, with the statistics they gathered, by direction.

    Raises:
        UserError: a pair's channels differ from the first pair's.
    """
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    some = pairs.spread(FIT_PAIRS)
    h, k = some.shape(0).channels
    fits = {"h2k": Ridge(h, k, kernel), "k2h": Ridge(k, h, kernel)}
    for i in tqdm(range(rank, len(some), count), desc="closed form", leave=False, disable=hidden(not rank)):
        pair = some[i]
        z_h, z_k = on_one_grid(pair.z_h[None].to(device), pair.z_k[None].to(device))
        if (z_h.shape[1], z_k.shape[1]) != (h, k):
            raise UserError(
                f"{some.name(i)}: {z_h.shape[1]} and {z_k.shape[1]} channels on one grid; the first has {h} and {k}"
            )
        fits["h2k"].add(z_h, z_k)
        fits["k2h"].add(z_k, z_h)
    if processes and count > 1:
        for fit in fits.values():
            fit.merge(processes.add)
    return fits


def affine_adapters(fits: dict[str, Ridge], spaces: tuple[LatentSpace, LatentSpace]) -> dict[str, LatentAdapter]:
    """The closed-form maps of both directions as adapters.

    Args:
        spaces: of z_h and of z_k.

    Raises:
        ValueError: there are too few positions for the closed form.
    """
    return {name: LatentAdapter(fits[name].solve(), *each.ordered(*spaces)) for name, each in DIRECTIONS.items()}
