"""Inspect Latent's report: what a latent is, as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.checks import check_values, latent_kind
from ..adapters.spaces import LatentSpace, fitting_spaces


def describe(z: Tensor, known: str | None = None) -> str:
    """Report shape, decoded size, statistics and likely space of a latent, one line each.

    Args:
        known: the name of the latent's space, if it is known.

    Raises:
        ValueError: z is not a dense float tensor, or is on the meta device.
    """
    check_values(z)
    spaces = [space for space in fitting_spaces(z.shape) if known in (None, space.name)]
    kind = f"a latent of {known}, {list(z.shape)}" if known else latent_kind(z.shape)
    lines = [f"This is {kind}, {str(z.dtype).removeprefix('torch.')} on {z.device}.", *_decoded(z.shape, spaces)]
    values = z.float()
    finite = torch.isfinite(values)
    if not finite.any():
        return "\n".join([*lines, "It holds no finite value: the sampler failed, or nothing was sampled."])
    if not finite.all():
        lines.append(f"{int((~finite).sum())} of {z.numel()} values are NaN or infinite: the sampler failed.")
    values = values[finite]
    std = values.std(correction=0).item()
    lines.append(
        f"Mean {values.mean():.3f}, standard deviation {std:.3f}, from {values.min():.3f} to {values.max():.3f}."
    )
    return "\n".join(lines + _verdict(spaces, std, known))


def _decoded(shape: Sequence[int], spaces: list[LatentSpace]) -> list[str]:
    """What the latent decodes to in each of the spaces; equal lines once."""
    lines = []
    for space in spaces:
        B, _, T, H, W = space.decoded_shape(shape)
        lines.append(f"It decodes to {_count(T, 'frame')} of {W} x {H} pixels, {_count(B, 'clip')}.")
    return list(dict.fromkeys(lines))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _verdict(spaces: list[LatentSpace], std: float, known: str | None) -> list[str]:
    if std == 0:
        return ["All values are equal: this is an empty latent, not sampled yet."]
    if known:
        return [f"Space: {known} (stated, not guessed from the shape)."]
    lines = []
    for space in spaces:
        # A sampler's latents have a standard deviation near 1; a raw one is that divided by the scaling factor.
        if space.scaling_factor and not 0.8 < space.scaling_factor < 1.25:
            raw = 1 / space.scaling_factor
            state = "raw" if abs(std - raw) < abs(std - 1) else "scaled"
            lines.append(
                f"If it is {space.name}, it looks {state}: raw latents of that space have a standard deviation of "
                f"about {raw:.2f}, scaled ones of about 1."
            )
    if len(spaces) > 1:
        lines.append("These spaces share one shape (Wan 2.1 too). Only the node that made the latent knows its space.")
    return lines
