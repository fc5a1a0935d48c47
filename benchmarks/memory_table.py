"""Memory to decode with KVAE-3D-1.0, by resolution and card: writes the table in docs/comfyui.md.

    python -m benchmarks.memory_table

The numbers are counted, not measured: those that ComfyUI gets from `HostVAE.memory_used_decode`, in bfloat16. The
weights and RESERVE are subtracted from the memory of each card.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kvae_comfyui.kvae import KVAE, BudgetError
from kvae_comfyui.serving.host_vae import HostVAE

PAGE = Path(__file__).parents[1] / "docs" / "comfyui.md"
START, END = "<!-- python -m benchmarks.memory_table -->\n", "<!-- end of the table -->"
SIZES = ((512, 512), (768, 512), (832, 480), (1280, 720), (1920, 1080))  # width, height
FRAMES = 121  # a longer clip needs no more
CARDS = (8, 12, 16, 24, 32)  # GB
RESERVE = 1.0  # GB that the system, the screen and CUDA keep for themselves


def table() -> str:
    """Markdown: a row for each size."""
    with torch.device("meta"):
        host = HostVAE(KVAE().to(torch.bfloat16))
    host.planner.device = torch.device("cuda")
    weights = sum(p.numel() * p.element_size() for p in host.parameters()) / 1e9
    rows = [["frames of", "least", "fastest", *(f"{card} GB" for card in CARDS)]]
    rows.append(["---"] * len(rows[0]))
    for width, height in SIZES:
        z = (1, 16, (FRAMES - 1) // 4 + 1, height // 8, width // 8)
        least, fastest = least_of(host, z), host.memory_used_decode(z, torch.bfloat16) / 1e9
        verdicts = [verdict(card - weights - RESERVE, least, fastest) for card in CARDS]
        rows.append([f"{width}x{height}", f"{least:.1f} GB", f"{fastest:.1f} GB", *verdicts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def least_of(host: HostVAE, z_shape: tuple[int, ...]) -> float:
    """GB of the exact plan that needs the least memory."""
    host.planner.budget = 0
    try:
        return host.memory_used_decode(z_shape, torch.bfloat16) / 1e9
    except BudgetError as error:
        return error.least.peak / 1e9
    finally:
        host.planner.budget = None


def verdict(free: float, least: float, fastest: float) -> str:
    """How a clip is decoded with `free` GB."""
    if free >= fastest:
        return "exact"
    return "exact, slower" if free >= least else "tiles"


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf-8")
    print(table())
