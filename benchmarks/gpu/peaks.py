"""Predicted and measured peak of the plans that budgets get."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvae_comfyui.benchmarks.frontier import frontier
from kvae_comfyui.benchmarks.gpu.coders import PLANS
from kvae_comfyui.benchmarks.gpu.measure import FAILED, NO_TIME, Cost, Share, attempt, cost_of, free
from kvae_comfyui.benchmarks.gpu.models import random_kvae, source_of
from kvae_comfyui.benchmarks.gpu.setup import Setup, Size, shape_text
from kvae_comfyui.benchmarks.kvae import exhaust
from kvae_comfyui.benchmarks.tables import paragraph
from kvae_comfyui.kvae import KVAE, Plan
from kvae_comfyui.serving.host_vae import HostVAE

MOST = 1.15  # times the measured peak, for a prediction


def section(setup: Setup) -> Iterator[str]:
    """The plans of all models for the first size, then those of the 1.0 for the others."""
    yield "## Predicted and measured peak, GB"
    yield ""
    yield from paragraph(
        "The plans that smaller and smaller budgets get. *counted*: by the plan. *allowed*: with what the nodes add to "
        f"it. *ratio*: allowed divided by measured; † marks those that are not between 1 and {MOST}."
    )
    yield ""
    yield "| | plan | counted | allowed | measured | ratio |"
    yield "|---|---|---|---|---|---|"
    share = Share(setup.shares["peaks"])
    first, *others = setup.plan_steps
    for name, size in [*((name, first) for name in setup.family), *(("1.0", size) for size in others)]:
        kvae = attempt(partial(folded, setup, name), setup.device)
        for direction in PLANS:
            label = f"{name} {direction}, {shape_text(size)}"
            if kvae is None or share.is_over:
                yield f"| {label} | {NO_TIME if kvae else FAILED} | | | | |"
            else:
                yield from rows(setup, share, label, kvae, direction, size)
        del kvae
        free(setup.device)


def folded(setup: Setup, name: str) -> KVAE:
    """The KVAE of this name."""
    return random_kvae(setup.family[name], setup.device, setup.dtype).fold()


@torch.inference_mode()
def rows(setup: Setup, share: Share, label: str, kvae: KVAE, direction: str, size: Size) -> Iterator[str]:
    """A row for each plan of one model, direction and size."""
    source = source_of(kvae.config, direction, size, setup.device, setup.dtype)
    parts, host = getattr(kvae, f"{direction}_parts"), HostVAE(kvae)
    attempt(partial(getattr(host, direction), source), setup.device)  # what the nodes allow for may be learned from it
    for plan in frontier(PLANS[direction], kvae, source.shape, setup.plan_steps[size], approximate=True):
        if share.is_over:
            yield f"| {label} | {NO_TIME} | | | | |"
            return
        cost = cost_of(partial(exhaust, parts, source, plan.execution), setup.device)
        allowed = plan.peak * allowance(kvae, direction, source)
        yield f"| {label} | {' | '.join(cells(setup, plan, allowed, cost))} |"


def cells(setup: Setup, plan: Plan, allowed: float, cost: Cost | None) -> list[str]:
    """A plan, its predicted and its measured peak; keeps the ratio for the goals."""
    found = [str(plan).split("; peak")[0], f"{plan.peak / 1e9:.2f}", f"{allowed / 1e9:.2f}"]
    if not cost:
        return [*found, FAILED, "–"]
    ratio = allowed / cost.peak
    setup.figures["predicted"].append(ratio)
    return [*found, f"{cost.peak / 1e9:.2f}", f"{ratio:.2f}{'' if 1 <= ratio <= MOST else ' †'}"]


def allowance(kvae: KVAE, direction: str, source: torch.Tensor) -> float:
    """Bytes that the nodes grant for each byte that a plan counts, as they are now known for this device and model."""
    plan, planner = PLANS[direction], HostVAE(kvae).planner
    return planner.memory(plan, source.shape, source.dtype) / plan(kvae, source.shape).peak
