"""Closed-form affine maps in both directions: the start of training, and the baseline of every adapter."""

from __future__ import annotations

from tqdm import tqdm

from ..data.dataset import Pairs
from ..errors import UserError
from ..runtime.processes import Processes
from .ridge import Ridge

FIT_PAIRS = 4096  # 44 million positions at 240x320, for maps of 433 unknowns per channel


def fit_both_ways(pairs: Pairs, device: str, kernel: int = 3, processes: Processes | None = None) -> dict[str, Ridge]:
    """Fit both directions, "h2k" and "k2h", to at most FIT_PAIRS of the pairs, evenly spread.

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
    h, k = some.shape(0)[:2]
    fits = {"h2k": Ridge(h, k, kernel), "k2h": Ridge(k, h, kernel)}
    hidden = True if rank else None
    for i in tqdm(range(rank, len(some), count), desc="closed form", leave=False, disable=hidden):
        pair = some[i]
        if (len(pair.z_h), len(pair.z_k)) != (h, k):
            raise UserError(f"{some.name(i)}: {len(pair.z_h)} and {len(pair.z_k)} channels; the first has {h} and {k}")
        z_h, z_k = pair.z_h[None].to(device), pair.z_k[None].to(device)
        fits["h2k"].add(z_h, z_k)
        fits["k2h"].add(z_k, z_h)
    if processes and count > 1:
        for fit in fits.values():
            fit.merge(processes.add)
    return fits
