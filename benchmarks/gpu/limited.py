"""Decode under a limit, in a process of its own: an allocator that has run out of memory is not as it was.

    python -m benchmarks.gpu.limited [tiny]      # prints each decode as a line of JSON

HostVAE decodes under two limits:

- *told*: another process holds the rest of the card, and HostVAE is told how much is free, as ComfyUI tells it.
- *not told*: the allocator gets no more (`set_per_process_memory_fraction`). HostVAE starts with its fastest plan, and
  must find one that fits.

If HostVAE gives up, it decodes in tiles, as ComfyUI's VAE Decode does then.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.gpu.holder import Holder
from kvae_comfyui.benchmarks.gpu.measure import attempt, free
from kvae_comfyui.benchmarks.gpu.models import random_hunyuan, random_kvae, source_of
from kvae_comfyui.benchmarks.gpu.setup import Setup, card_setup, tiny_setup
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.memory import free_memory

TRIED = "Out of memory; trying again with "
TILES = "tiles of 256 pixels, not exact"  # ComfyUI's: 32 latents, which share 8
WARM = 8  # latents: the side of the clip that loads code and kernels
WAYS = ("told", "not told", "HunyuanVideo")

Tries = dict[str, Callable[[], object]]  # in turn until one finds memory, by what the report calls it


@dataclass(frozen=True)
class Decode:
    """One decode.

    Attributes:
        way: one of WAYS.
        free: GB for the process, weights included; None: the whole card.
        seconds: of all tries; None: out of memory.
        tried: what was tried after the first try ran out of memory.
    """

    way: str
    free: float | None
    seconds: float | None
    tried: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return self.seconds is not None and not any("not exact" in each for each in self.tried[-1:])


def main() -> None:
    """Print all decodes."""
    for decode in decodes(tiny_setup() if "tiny" in sys.argv else card_setup()):
        print(json.dumps(asdict(decode)), flush=True)


@torch.inference_mode()
def decodes(setup: Setup) -> Iterator[Decode]:
    """HostVAE under both limits, then HunyuanVideo's VAE under the second."""
    kvae = random_kvae(setup.family["1.0"], setup.device, setup.dtype).fold()
    z, host = source_of(kvae.config, "decode", setup.ladder_size, setup.device, setup.dtype), HostVAE(kvae)
    host.decode(z[..., :WARM, :WARM])
    host.planner.free_memory = partial(free_memory, setup.device)
    with ExitStack() as stack:
        holder = stack.enter_context(Holder()) if setup.device.type == "cuda" else None
        for gigabytes in setup.free:
            if holder and gigabytes:
                free(setup.device)
                holder.leave(int(1e9 * gigabytes) - torch.cuda.memory_reserved())
            yield decode("told", gigabytes, host_tries(host, z), setup.device)
    host.planner.free_memory = lambda: None
    for gigabytes in setup.free:
        with limit(gigabytes, setup.device):
            yield decode("not told", gigabytes, host_tries(host, z), setup.device)
    del host, kvae
    hunyuan = random_hunyuan(setup, setup.dtype)
    hunyuan.decode(z[..., :WARM, :WARM])
    for gigabytes in setup.free:
        with limit(gigabytes, setup.device):
            yield decode("HunyuanVideo", gigabytes, hunyuan_tries(hunyuan, z), setup.device)


def decode(way: str, gigabytes: float | None, tries: Tries, device: torch.device) -> Decode:
    """Try in turn until one finds memory."""
    free(device)
    start = time.perf_counter()
    with lines_of_the_ladder() as tried:
        for name, run in tries.items():
            if name:
                tried.append(name)
            if attempt(run, device) is not None:
                return Decode(way, gigabytes, time.perf_counter() - start, tried)
    return Decode(way, gigabytes, None, tried)


def host_tries(host: HostVAE, z: Tensor) -> Tries:
    """HostVAE as it decodes; then, as ComfyUI's VAE Decode would, in tiles. The frames go to the CPU."""
    return {"": lambda: host.decode(z), TILES: lambda: host.decode_tiled(z, 32, 32, 8)}


def hunyuan_tries(vae: Any, z: Tensor) -> Tries:
    """As diffusers decodes; then in tiles of the same size. The frames go to the CPU."""

    def whole() -> Tensor:
        vae.use_tiling = False
        return vae.decode(z).sample.to("cpu", torch.float32)

    def tiled() -> Tensor:
        vae.enable_tiling()  # 256 pixels, one every 192
        return vae.decode(z).sample.to("cpu", torch.float32)

    return {"": whole, TILES: tiled}


@contextmanager
def limit(gigabytes: float | None, device: torch.device) -> Iterator[None]:
    """Limit what this process may allocate, weights included."""
    if gigabytes is None:
        yield
        return
    free(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * gigabytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def lines_of_the_ladder() -> Iterator[list[str]]:
    """Collects what HostVAE says that it tries next."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith(TRIED):
                said.append(text.removeprefix(TRIED))

    listener = Listener()
    logging.getLogger().addHandler(listener)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(listener)


if __name__ == "__main__":
    main()
