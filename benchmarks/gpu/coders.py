"""Decoding and encoding: seconds and memory of KVAE and of the modules of diffusers, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch

from kvae_comfyui.benchmarks.gpu.convolutions import floor
from kvae_comfyui.benchmarks.gpu.measure import FAILED, NO_TIME, Run, Share, attempt, free, interleaved, shown
from kvae_comfyui.benchmarks.gpu.models import diffusers_twin, random_kvae, run_of, source_of
from kvae_comfyui.benchmarks.gpu.setup import Setup, Size, shape_text
from kvae_comfyui.benchmarks.tables import paragraph
from kvae_comfyui.kvae import KVAE, Execution, plan_decode, plan_encode

PLANS = {"decode": plan_decode, "encode": plan_encode}
KERNEL = "kvae_comfyui.kvae.engine.fused_norm"
SIDES = ("diffusers", "default", "fastest", "torch")


def section_1(setup: Setup) -> Iterator[str]:
    """KVAE-3D-1.0 against AutoencoderKLKVAEVideo."""
    yield from section(setup, "1.0", ("1.0",), "`AutoencoderKLKVAEVideo` of diffusers, with the same weights")


def section_2(setup: Setup) -> Iterator[str]:
    """The 2.0 models; diffusers has one of them."""
    names = ("2.0-t4s8", "2.0-t4s16")
    yield from section(setup, "2.0", names, "`Kandinsky6SRVAE` of diffusers, with the weights of the t4s16")


def section(setup: Setup, title: str, names: tuple[str, ...], theirs: str) -> Iterator[str]:
    """A table of some models."""
    yield f"## KVAE-3D-{title}, seconds / GB"
    yield ""
    yield from paragraph(
        f"{str(setup.dtype)[6:]}, random weights, medians of runs in turns; GB are the most that was allocated beyond "
        f"weights and input. *diffusers*: {theirs}. "
        "*fastest*: the plan without a budget; *default*: no plan, if that is another execution; *torch*: the fastest "
        "without the fused kernel. *ratio*: diffusers and the fastest."
    )
    yield ""
    yield f"| | {' | '.join(SIDES)} | ratio, s | ratio, GB | floor, s | divided by the floor |"
    yield "|---|---|---|---|---|---|---|---|---|"
    share = Share(setup.shares[title])
    for name in names:
        yield from rows(setup, share, name)


def rows(setup: Setup, share: Share, name: str) -> Iterator[str]:
    """The rows of one model. Its weights are freed afterwards."""
    made = attempt(partial(models, setup, name), setup.device)
    for size in setup.sizes:
        for direction in PLANS:
            label = f"{name} {direction}, {shape_text(size)}"
            if made is None or share.is_over:
                yield f"| {label} | {NO_TIME if made else FAILED} |{' |' * 7}"
            else:
                measured = attempt(partial(cells, setup, *made, name, direction, size), setup.device)
                yield f"| {label} | {' | '.join(measured or [FAILED] + [''] * 7)} |"
    del made
    free(setup.device)


def models(setup: Setup, name: str) -> tuple[KVAE, Any]:
    """A KVAE, and the module of diffusers for it or None."""
    kvae = random_kvae(setup.family[name], setup.device, setup.dtype)
    twin = diffusers_twin(kvae)
    return kvae.fold(), twin


@torch.inference_mode()
def cells(setup: Setup, kvae: KVAE, twin: Any, name: str, direction: str, size: Size) -> list[str]:
    """Measure a row, and note its figures for the goals."""
    costs = interleaved(runs(setup, kvae, twin, direction, size), setup.device, setup.row_seconds)
    theirs, ours = costs.get("diffusers"), costs["fastest"]
    least = floor(setup, kvae.config, direction, size)
    found = [shown(costs[side]) if side in costs else "–" for side in SIDES]
    if not ours:
        return [*found, *"––", f"{least:.3f}", "–"]
    setup.figures[f"{name} {direction} floor"].append(ours.seconds / least)
    if theirs:
        setup.figures[f"{name} {direction}"].append(theirs.seconds / ours.seconds)
        setup.figures[f"{name} {direction} peak"].append(ours.peak / theirs.peak)
        found += [f"{theirs.seconds / ours.seconds:.2f}x", f"{ours.peak / theirs.peak:.2f}"]
    else:
        found += "––"
    return [*found, f"{least:.3f}", f"{ours.seconds / least:.2f}"]


def runs(setup: Setup, kvae: KVAE, twin: Any, direction: str, size: Size) -> dict[str, Run]:
    """What takes turns, by the heading of its column."""
    source = source_of(kvae.config, direction, size, setup.device, setup.dtype)
    fastest = PLANS[direction](kvae, source.shape).execution
    found = {"diffusers": run_of(twin, direction, source)} if twin else {}
    if fastest != Execution():
        found["default"] = run_of(kvae, direction, source)
    found["fastest"] = run_of(kvae, direction, source, fastest)
    if find_spec(KERNEL):
        found["torch"] = partial(run_without_kernel, found["fastest"])
    return found


def run_without_kernel(run: Run) -> object:
    """Run with PyTorch's operators in place of the fused kernel."""
    with patch.object(import_module(KERNEL), "DEVICES", ()):
        return run()
