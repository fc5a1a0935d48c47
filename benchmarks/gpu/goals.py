"""The goals for one H100 or H200, and whether this card meets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvae_comfyui.benchmarks.gpu.peaks import MOST
from kvae_comfyui.benchmarks.gpu.setup import Setup


@dataclass(frozen=True)
class Goal:
    """What every figure of one name must be."""

    text: str
    figures: str  # their name in `Setup.figures`
    least: float | None = None
    most: float | None = None

    def row(self, setup: Setup) -> str:
        """The worst figure, or the range, and whether it meets the goal."""
        figures = setup.figures.get(self.figures)
        ends = [("≥", self.least, min), ("≤", self.most, max)]
        wanted = " ".join(f"{sign} {bound:g}" for sign, bound, _ in ends if bound is not None)
        if not figures:
            return f"| {self.text} | {wanted} | not measured | |"
        worst = " to ".join(f"{end(figures):.2f}" for _, bound, end in ends if bound is not None)
        met = "yes" if all(self.meets(figure) for figure in figures) else "no"
        return f"| {self.text} | {wanted} | {worst} | {met} |"

    def meets(self, figure: float) -> bool:
        return (self.least is None or figure >= self.least) and (self.most is None or figure <= self.most)


MEMORY = "33x720x1280 with 24, 16, 12 and 8 GB"
GOALS = [
    Goal("1.0 decode, times diffusers", "1.0 decode", least=3),
    Goal("1.0 encode, times diffusers", "1.0 encode", least=2),
    Goal("2.0-t4s16 decode, times diffusers", "2.0-t4s16 decode", least=2),
    Goal("1.0 decode, divided by the floor", "1.0 decode floor", most=2),
    Goal("1.0 encode, divided by the floor", "1.0 encode floor", most=2),
    Goal("1.0 decode, peak of the fastest plan divided by diffusers'", "1.0 decode peak", most=0.4),
    Goal("1.0 encode, peak of the fastest plan divided by diffusers'", "1.0 encode peak", most=0.4),
    Goal("2.0-t4s16 decode, peak of the fastest plan divided by diffusers'", "2.0-t4s16 decode peak", most=0.4),
    Goal("allowed peak divided by measured peak, every plan", "predicted", least=1, most=MOST),
    *(
        goal
        for where, name in (("HostVAE", "ladder"), ("ComfyUI", "ComfyUI"))
        for goal in (
            Goal(f"{where}, {MEMORY}: part that was out of memory", f"{name} fails", most=0),
            Goal(f"{where}, with 12 GB or more: part that was exact", f"{name} exact", least=1),
            Goal(f"{where}, {MEMORY}: seconds divided by HunyuanVideo's", f"{name}, of HunyuanVideo", most=1),
            Goal(f"{where}, 24 GB: seconds divided by the whole card's", f"{name}, of the whole card", most=1.2),
        )
    ),
    Goal("extraction in float32, times one at a time", "extraction, float32", least=2),
    Goal("latents in bfloat16, part of the variance that differs", "bfloat16 latents", most=0.01),
]


def section(setup: Setup) -> Iterator[str]:
    """A row for each goal."""
    yield "## Goals"
    yield ""
    yield "For an H100 or H200 with bfloat16. *measured*: the worst figure of the tables above, or the range."
    yield ""
    yield "| | goal | measured | met |"
    yield "|---|---|---|---|"
    yield from (goal.row(setup) for goal in GOALS)
