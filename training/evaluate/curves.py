"""Plots of a training and of latent channels, as PNG files in memory."""

from __future__ import annotations

import io
import math
from typing import Any

from ..directions import DIRECTIONS
from .spectrum import frequencies

PARTS = {"train": ":", "val": "-"}  # sets of pairs, and the line style of their curves
COLORS = {"h2k": "tab:blue", "k2h": "tab:orange"}
MOST_DRAWN = 1e30  # matplotlib's scales overflow beyond it


def curves_png(rows: list[dict[str, Any]]) -> bytes:
    """Plot the MSE of both directions over the steps, on training and validation pairs.

    Args:
        rows: the training's log, see `read_log`.
    """
    figure, axes = subplots(1, 4)
    for name, direction in DIRECTIONS.items():
        for part, style in PARTS.items():
            if found := points(rows, f"{part}_{name}"):
                label = f"{direction.arrow} {part}"
                axes[0].plot(*zip(*found, strict=True), style, color=COLORS[name], label=label)
    axes[0].set(xlabel="step", ylabel="latent MSE", yscale="log")
    axes[0].legend()
    return png(figure)


def has_curves(rows: list[dict[str, Any]]) -> bool:
    """Whether the log has anything to draw."""
    return any(points(rows, f"{part}_{name}") for part in PARTS for name in DIRECTIONS)


def channels_png(channels: dict[str, list[float]]) -> bytes:
    """Plot mean and deviation of every channel of both spaces, and each adapter's relative MSE in them.

    Args:
        channels: from `latent_metrics`.
    """
    figure, axes = subplots(2, 5)
    for space, color in (("z_h", "tab:blue"), ("z_k", "tab:orange")):
        mean, std = channels[f"{space} mean"], channels[f"{space} std"]
        axes[0].errorbar(range(len(mean)), mean, std, fmt="o", ms=3, color=color, label=f"{space}: mean ± deviation")
    for name, direction in DIRECTIONS.items():
        share, label = channels[f"{direction.arrow} share"], f"{direction.arrow}: error, of variance"
        axes[1].plot(range(len(share)), share, "o-", ms=3, color=COLORS[name], label=label)
    axes[1].set(xlabel="channel", ylim=(0, None))
    for each in axes:
        each.legend()
    return png(figure)


def spectrum_png(spectra: dict[str, dict[str, list[float | None]]]) -> bytes:
    """Plot errors by spatial frequency.

    Args:
        spectra: by what the frequencies are of, "latent" or "pixel": by name, the shares of `Spectrum`.
    """
    figure, axes = subplots(1, 4, len(spectra))
    for each, (unit, curves) in zip(axes, spectra.items(), strict=True):
        for (name, shares), color in zip(curves.items(), COLORS.values(), strict=False):
            found = [(x, share) for x, share in zip(frequencies(), shares, strict=True) if share is not None]
            each.plot(*zip(*found, strict=True), "o-", ms=3, color=color, label=name)
        each.set(xlabel=f"cycles for each {unit}", ylabel="error, of the target's power", yscale="log")
        each.legend()
    return png(figure)


def points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and values of one curve."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and abs(value) < MOST_DRAWN and math.isfinite(value)

    return [(row["step"], row[key]) for row in rows if number(row.get("step")) and number(row.get(key))]


def subplots(rows: int, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of several plots, the first of each row and then those beside them; the height is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(8, height), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def png(figure: Any) -> bytes:
    """A figure as a PNG file, and nothing left of it in memory."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()
