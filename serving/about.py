"""Load KVAE's report: which files a VAE is made of, which latents it takes, and how usual sizes fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from ..adapters.adapter import LatentAdapter
from ..adapters.published import REACHED, VAES_REACH
from ..kvae import BudgetError, plan_decode, plan_encode
from .dtypes import DTYPES
from .host_vae import HostVAE
from .planning import PlanFunction

SIZES = (832, 480), (1280, 720)  # width, height; few, since plans take time
FRAMES = 121
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def about(host: HostVAE, names: Sequence[str], free: int | None = None) -> str:
    """The files with their dtype, size and spaces, and the memory that usual sizes need, one line each.

    Args:
        names: of the files: the KVAE's, and those of the adapters to decode and to encode, if there are any.
        free: bytes that activations may use, where the planner has no budget; None: unknown.
    """
    kvae, decode_adapter, encode_adapter = names
    weight, size = next(host.kvae.parameters()), sum(each.nbytes for each in host.kvae.parameters())
    lines = [f"{kvae}: {NAMES.get(weight.dtype, weight.dtype)}, {_gb(size)} of weights"]
    if not (host.vae.decode_adapter or host.vae.encode_adapter):
        lines.append(f"decodes and encodes {host.space.name} latents, KVAE's own, without adapters")
    else:
        lines += _through("decode", host, host.vae.decode_adapter, decode_adapter)
        lines += _through("encode", host, host.vae.encode_adapter, encode_adapter)
    return "\n".join([*lines, *_memory(host, free)])


def _through(verb: str, host: HostVAE, adapter: LatentAdapter | None, name: str) -> list[str]:
    """What an adapter's file says of itself."""
    if adapter is None:
        return [f"cannot {verb} {host.space.name} latents: no adapter"]
    lines = [
        f"{verb}s {host.space.name} latents through {name}:",
        *(f"  {line}" for line in adapter.about().split("\n")),
    ]
    if name in REACHED and not adapter.metrics:
        lines.append(f"  {REACHED[name]} dB, where the VAEs alone reach {VAES_REACH}: for trying, not for pictures")
    return lines


def _memory(host: HostVAE, free: int | None) -> list[str]:
    budget = host.planner.budget
    limit = f"; memory_gb is {budget / 1e9:g}" if budget else f"; {_gb(free)} are free" if free is not None else ""
    native = not (host.vae.decode_adapter or host.vae.encode_adapter)
    lines = [f"memory for {FRAMES} frames, in addition to the weights{limit}:"]
    for width, height in SIZES:
        ways = []
        if native or host.vae.decode_adapter:
            shape = 1, *host.space.latent_shape(FRAMES, height, width)
            ways.append(f"decode {_way(host, plan_decode, shape, free)}")
        if native or host.vae.encode_adapter:
            ways.append(f"encode {_way(host, plan_encode, (1, 3, FRAMES, height, width), free)}")
        lines.append(f"  {width}x{height}: {'; '.join(ways)}")
    return lines


def _way(host: HostVAE, plan: PlanFunction, shape: Sequence[int], free: int | None) -> str:
    """In how many GB a clip of this shape is computed, and how."""
    dtype, budget = next(host.kvae.parameters()).dtype, host.planner.budget
    unlimited = copy(host)
    unlimited.planner = replace(host.planner, budget=None)
    used = unlimited.memory_used_decode if plan is plan_decode else unlimited.memory_used_encode
    planned = host.kvae_shape(shape) if plan is plan_decode else shape
    fastest, counted = used(shape, dtype), unlimited.planner.memory(plan, planned, dtype)
    held = fastest - counted
    room = free - held if budget is None and free is not None else budget
    if room is None or counted <= room:
        return f"{_gb(fastest)}, exact"
    try:
        slower = replace(host.planner, budget=max(0, int(room))).memory(plan, planned, dtype)
    except BudgetError as error:
        return f"exact from {_gb(error.least.peak + held)} on, below that only in approximate tiles"
    return f"{_gb(slower + held)}, exact and slower (fastest in {_gb(fastest)})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
