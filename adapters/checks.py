"""Checks of latents and pixels before work is spent on them. Each error says what was found and what to do.

A shape does not tell everything: HunyuanVideo, KVAE 1.0 and KVAE 2.0-t4s8 latents have the same grid. Latents made by
this project therefore carry the name of their space.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kvae.finite import all_finite
from .spaces import LatentSpace, fitting_spaces

# Channels of video latents that people meet, but that no adapter here maps.
FOREIGN = {12: "Mochi", 16: "Wan 2.1 or CogVideoX or Cosmos", 48: "Wan 2.2 5B", 128: "LTX-Video"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_latent(z_Bcthw: Tensor, space: LatentSpace, known: str | None = None) -> None:
    """Raise unless this is a latent [B, c, t, h, w] of this space with finite values.

    Args:
        known: the name of the latent's space, if it is known.

    Raises:
        ValueError: says what was found, what was expected and what to do.
    """
    check_tensor(z_Bcthw, "latent")
    check_shape(z_Bcthw.shape, space, known)
    check_finite(z_Bcthw, "latent")


def check_tensor(x: object, what: str) -> None:
    """Raise unless x is a dense float tensor.

    Args:
        what: "latent" or "pixels", for the message.

    Raises:
        ValueError: it is another type, layout or dtype.
    """
    expected = "expected a tensor of float32, bfloat16 or float16"
    subject = "These pixels are" if what == "pixels" else f"This {what} is"
    if not isinstance(x, Tensor):
        raise ValueError(f"{subject} a {type(x).__name__}; {expected}. Check what made it.")
    if x.layout != torch.strided:
        raise ValueError(f"{subject} {_plain(x.layout)}; {expected}. Check what made it.")
    if x.dtype not in DTYPES:
        raise ValueError(f"{subject} of {_plain(x.dtype)}; {expected}. Check what made it.")


def check_values(z: object) -> None:
    """Raise unless z is a dense float tensor that holds values, which one on the meta device does not.

    Raises:
        ValueError: as `check_tensor`; or z is on the meta device.
    """
    check_tensor(z, "latent")
    if z.is_meta:  # type: ignore[attr-defined]
        raise ValueError("This latent is on the meta device: it has a shape, but no values. Check what made it.")


def check_finite(x: Tensor, what: str) -> None:
    """Raise if a value is NaN or infinite. A tensor on the meta device has no values, and passes.

    Args:
        what: "latent" or "pixels", for the message.

    Raises:
        ValueError: says how many values are not finite, and the usual cause.
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
    """Raise unless this is the shape of a latent of this space.

    Args:
        known: the name of the latent's space, if it is known.

    Raises:
        ValueError: other sides, another known space, or an empty latent.
    """
    expected = f"expected a {space.name} latent, [B, {space.channels}, t, h, w]"
    if len(shape) != 5 or shape[1] != space.channels:
        raise ValueError(f"This is {latent_kind(shape)}; {expected}. {_advice(shape)}")
    if known not in (None, space.name):
        raise ValueError(
            f"This is a latent of {known}; {expected}. Both have the same shape, but not the same meaning: "
            f"convert it with an adapter {known} → {space.name}, or use a VAE for {known}."
        )
    if 0 in shape:
        raise ValueError(f"This latent is empty, {list(shape)}; {expected}. Check what made it.")


def latent_kind(shape: Sequence[int]) -> str:
    """The kind of latent with this shape, as words that complete "this is …"."""
    if len(shape) == 4:
        return f"an image latent, {list(shape)}"
    if len(shape) != 5:
        return f"not a latent of an image or a video, {list(shape)}"
    names = [space.name for space in fitting_spaces(shape)]
    if shape[1] in FOREIGN:
        names.append(FOREIGN[shape[1]])
    if names:
        return f"a latent of {' or '.join(names)}, {list(shape)}"
    return f"a video latent with {shape[1]} channels, which no known space has, {list(shape)}"


def _advice(shape: Sequence[int]) -> str:
    if len(shape) == 5 and shape[1] == 32:
        return (
            "HunyuanVideo 1.5 has its own VAE: load that with Load VAE, or KVAE 2.0-t4s16 with adapters for "
            "HunyuanVideo 1.5 with Load KVAE."
        )
    if len(shape) == 5 and shape[1] == 64:
        return "KVAE 2.0-t4s16 decodes it without adapters: load that file."
    if len(shape) == 4:
        return "Decode it with the VAE of the image model that made it."
    return "Decode it with the VAE of the model that made it."


def _plain(name: torch.layout | torch.dtype) -> str:
    return str(name).removeprefix("torch.")
