"""What a latent is: the spaces its shape fits, what it decodes to, and whether it is fit to be decoded.

A shape does not tell everything: HunyuanVideo, KVAE 1.0 and KVAE 2.0-t4s8 latents share one grid, which is why latents
made by this project carry their space's name beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kvae.finite import all_finite
from .spaces import SPACES, LatentSpace

# Channels of video latents that people meet but that no adapter here maps.
FOREIGN = {12: "Mochi", 48: "Wan 2.2 5B", 128: "LTX-Video"}


def fitting_spaces(shape: Sequence[int]) -> list[LatentSpace]:
    """The spaces whose latents have this shape, most common first; none for an image latent."""
    if len(shape) != 5:
        return []
    return [space for space in SPACES.values() if space.channels == shape[1]]


def what_latent(shape: Sequence[int]) -> str:
    """What a latent of this shape looks like, as words that complete "this is …"."""
    if len(shape) == 4:
        return f"an image latent, {list(shape)}"
    if len(shape) != 5:
        return f"not a latent of an image or a video, {list(shape)}"
    names = [space.name for space in fitting_spaces(shape)]
    if names:
        return f"a latent of {' or '.join(names)}, {list(shape)}"
    if shape[1] in FOREIGN:
        return f"a latent of {FOREIGN[shape[1]]}, {list(shape)}"
    return f"a video latent of {shape[1]} channels, which no space here has, {list(shape)}"


def check_latent(z: Tensor, space: LatentSpace, known: str | None = None) -> None:
    """Refuse what is not a latent [B, c, t, h, w] of this space, or is spoilt.

    Args:
        known: the name of the space the latent is known to be of, if it is.

    Raises:
        ValueError: names what was found, what was expected and what to do.
    """
    check_tensor(z, "latent")
    check_shape(z.shape, space, known)
    check_finite(z, "latent")


def check_tensor(x: object, what: str) -> None:
    """Refuse what is not a dense tensor of floats.

    Args:
        what: "latent" or "pixels", for the message.

    Raises:
        ValueError: it is none.
    """
    expected = "expected a tensor of float32, bfloat16 or float16"
    if not isinstance(x, Tensor):
        raise ValueError(f"This {what} is a {type(x).__name__}; {expected}. Check what made it.")
    if x.layout != torch.strided:
        raise ValueError(f"This {what} is {str(x.layout).removeprefix('torch.')}; {expected}. Check what made it.")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"This {what} is of {str(x.dtype).removeprefix('torch.')}; {expected}. Check what made it.")


def check_values(z: object) -> None:
    """Refuse what is not a latent with values: no dense tensor of floats, or one of the meta device.

    Raises:
        ValueError: it is not.
    """
    check_tensor(z, "latent")
    if z.is_meta:  # type: ignore[attr-defined]
        raise ValueError("This latent is on the meta device: it has a shape, but no values. Check what made it.")


def check_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinite values. On the meta device there are none.

    Raises:
        ValueError: says how many there are, and where they come from as a rule.
    """
    if all_finite(x):
        return
    bad = int((~torch.isfinite(x.detach())).sum())
    if what == "latent":
        raise ValueError(
            f"{bad} of {x.numel()} values of this latent are NaN or infinite; it would decode to a black picture. "
            "The sampler failed: run the diffusion model in bfloat16 rather than float16, or lower its guidance."
        )
    raise ValueError(f"{bad} of {x.numel()} values of these pixels are NaN or infinite. Check what made them.")


def check_shape(shape: Sequence[int], space: LatentSpace, known: str | None = None) -> None:
    """What a shape alone can tell of that.

    Raises:
        ValueError: as `check_latent`.
    """
    expected = f"expected a {space.name} latent, [B, {space.channels}, t, h, w]"
    if len(shape) != 5 or shape[1] != space.channels:
        raise ValueError(f"This is {what_latent(shape)}; {expected}. {_advice(shape)}")
    if known not in (None, space.name):
        raise ValueError(
            f"This is a latent of {known}; {expected}. Both have the same shape, but not the same meaning: "
            f"convert it with an adapter {known} → {space.name}, or use a VAE for {known}."
        )
    if 0 in shape:
        raise ValueError(f"This latent is empty, {list(shape)}; {expected}. Check what made it.")


def _advice(shape: Sequence[int]) -> str:
    if len(shape) == 5 and shape[1] == 32:
        return "HunyuanVideo 1.5 has a VAE of its own: decode it with that, by Load VAE and VAE Decode."
    if len(shape) == 5 and shape[1] == 64:
        return "KVAE 2.0-t4s16 decodes it natively: load that file, without adapters."
    if len(shape) == 4:
        return "Decode it with the VAE of the image model that made it."
    return "Decode it with the VAE of the model that made it."


def describe(z: Tensor, known: str | None = None) -> str:
    """A report on a latent: shape, what it decodes to, statistics, which space it looks like and why.

    Raises:
        ValueError: it is no tensor of floats, or its values are nowhere (the meta device).
    """
    check_values(z)
    spaces = [space for space in fitting_spaces(z.shape) if known in (None, space.name)]
    kind = f"a latent of {known}, {list(z.shape)}" if known else what_latent(z.shape)
    lines = [f"This is {kind}, {str(z.dtype).removeprefix('torch.')} on {z.device}."]
    for grid in dict.fromkeys((s.time, s.space) for s in spaces):
        frames, height, width = grid[0] * (z.shape[2] - 1) + 1, grid[1] * z.shape[3], grid[1] * z.shape[4]
        lines.append(f"It decodes to {frames} frames of {width} x {height} pixels, {z.shape[0]} clip(s).")
    values = z.float()
    finite = torch.isfinite(values)
    if not finite.any():
        return "\n".join([*lines, "It holds no finite value: the sampler failed, or nothing was sampled."])
    if not finite.all():
        lines.append(f"{int((~finite).sum())} of {z.numel()} values are NaN or infinite: the sampler failed.")
    values = values[finite]
    std = values.std(correction=0).item()
    lines.append(f"Mean {values.mean():.3f}, deviation {std:.3f}, from {values.min():.3f} to {values.max():.3f}.")
    return "\n".join(lines + _verdict(spaces, std, known))


def _verdict(spaces: list[LatentSpace], std: float, known: str | None) -> list[str]:
    if std == 0:
        return ["All values are equal: this is an empty latent, not sampled yet."]
    if known:
        return [f"Its space, {known}, is known for sure: what made it says so."]
    lines = []
    for space in spaces:
        # A sampler's latents have a deviation near 1; a raw one is that divided by the scaling factor.
        if space.scaling_factor and not 0.8 < space.scaling_factor < 1.25:
            raw = 1 / space.scaling_factor
            state = "raw" if abs(std - raw) < abs(std - 1) else "scaled"
            lines.append(
                f"If it is {space.name}, it looks {state}: raw latents of that space deviate by about {raw:.2f}, "
                "scaled ones by about 1."
            )
    if len(spaces) > 1:
        lines.append("These spaces share one shape (Wan 2.1 too); only what made the latent tells which one it is.")
    return lines
