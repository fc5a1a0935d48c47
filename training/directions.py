"""The two directions between the latent spaces of a pair.

A pair holds `z_h`, latents of HunyuanVideo or HunyuanVideo 1.5, and `z_k`, latents of a KVAE of any kind. The keys
"h2k" and "k2h" in files, logs and options stand for z_h → z_k and z_k → z_h, whatever the two spaces are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Direction:
    """One direction.

    Attributes:
        name: its key, "h2k" or "k2h".
        arrow: its name in tables and reports.
        label: its name in messages.
        decoder: the name in tables and reports of the VAE that decodes the adapter's result.
    """

    name: str
    arrow: str
    label: str
    decoder: str

    @property
    def opposite(self) -> str:
        """The key of the other direction."""
        return "k2h" if self.name == "h2k" else "h2k"

    def ordered(self, h: T, k: T) -> tuple[T, T]:
        """(source, target) of this direction, from a value for z_h and a value for z_k."""
        return (h, k) if self.name == "h2k" else (k, h)


DIRECTIONS = {
    "h2k": Direction("h2k", "H→K", "Hunyuan→KVAE", "KVAE"),
    "k2h": Direction("k2h", "K→H", "KVAE→Hunyuan", "Hunyuan"),
}
