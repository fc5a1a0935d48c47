"""The choices of *latents* in Load KVAE: whose latents a VAE reads and writes, and which of them a KVAE can serve."""

from __future__ import annotations

from ..adapters.spaces import LatentSpace, latent_space, spatial_ratio

HUNYUAN, HUNYUAN_15, NATIVE = "HunyuanVideo / Kandinsky 5", "HunyuanVideo 1.5", "KVAE (native)"
SPACES = {HUNYUAN: latent_space("hunyuan_video"), HUNYUAN_15: latent_space("hunyuan_video_1.5")}
CHOICES = [*SPACES, NATIVE]  # workflows hold them as text


def served_by(native: LatentSpace) -> list[str]:
    """The choices that a KVAE with these latents can serve: latents of its own grid or a finer one, and its own."""
    return [choice for choice, space in SPACES.items() if _serves(native, space)] + [NATIVE]


def cannot_serve(kvae_name: str, native: LatentSpace, choice: str) -> str:
    """The message if a KVAE cannot serve a choice."""
    return f'{kvae_name} is {native.name}, which cannot serve "{choice}": set latents to {quoted(served_by(native))}.'


def quoted(choices: list[str]) -> str:
    """The choices in words: "this" or "that"."""
    return " or ".join(f'"{choice}"' for choice in choices)


def _serves(native: LatentSpace, space: LatentSpace) -> bool:
    """Whether each position of the KVAE stands for one position of the space, or for a whole block of them."""
    return spatial_ratio(space, native) is not None and space.spatial_factor <= native.spatial_factor
