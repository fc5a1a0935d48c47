"""The entries of ComfyUI's LATENT beside its samples, as they are saved."""

from __future__ import annotations

from typing import Any

from ..serving.latent_extras import MASK, Extras
from .latent_dict import joined


def extras_of(latent: dict) -> Extras:
    """The entries of a LATENT that belong into its file.

    Raises:
        ValueError: as `Extras`.
    """
    mask: Any = latent.get(MASK)
    nested = getattr(mask, "is_nested", False)
    masks = tuple(mask.unbind()) if nested else () if mask is None else (mask,)
    index, rate = latent.get("batch_index") or (), latent.get("sample_rate")
    index = tuple(index) if isinstance(index, list | tuple) else (index,)
    return Extras(masks, nested, index, int(rate) if isinstance(rate, float) and rate.is_integer() else rate)


def entries_of(extras: Extras) -> dict[str, Any]:
    """The entries for a LATENT. Of a mask of several parts, a ComfyUI without nested latents gets the video's."""
    mask = (joined(extras.masks) if extras.nested else extras.masks[0]) if extras.masks else None
    entries = {MASK: mask, "batch_index": list(extras.batch_index) or None, "sample_rate": extras.sample_rate}
    return {name: entry for name, entry in entries.items() if entry is not None}
