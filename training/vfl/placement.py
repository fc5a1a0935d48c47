"""Where the base lies and in which precision, so that it fits: on the device, in host memory, or shared by processes.

place(transformer, torch.device("cuda"), "fp8", offload=True)      # after the LoRA was added

The LoRA is float32 and whole on every device. All of it computes in bfloat16, unless the base is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import lora_layers, lora_parameters

BASE_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}  # in which each is loaded
COMPUTED = torch.bfloat16
STORED = torch.float8_e4m3fn


def place(transformer: Any, device: torch.device, base_dtype: str, offload: bool = False, shards: int = 1) -> None:
    """Move a network with a LoRA to where it is trained.

    Args:
        transformer: on the CPU, loaded in BASE_DTYPES[base_dtype].
        base_dtype: "fp8" stores the blocks' matrices in float8.
        offload: whether the blocks wait in host memory, and visit the device one after the other.
        shards: the processes that share the base; each then holds one part of it, and all must run the same passes.
    """
    blocks = list(transformer.transformer_blocks)
    if base_dtype == "fp8":
        for layer in _frozen_matrices(blocks):
            layer.weight.data = layer.weight.data.to(STORED)
            layer.forward = partial(_widened, layer)  # diffusers' casting cannot be told to take the modulation too
    if base_dtype != "fp32":
        for _, each in lora_layers(transformer):
            each.cast_input_dtype_enabled = False  # peft would keep another copy of each input, in float32
        transformer.forward = torch.autocast(device.type, COMPUTED)(transformer.forward)
    if offload:
        Visits(blocks, device)
    if shards > 1:
        _share(transformer, blocks, device, shards)
    for name, part in transformer.named_children():
        if not (offload and name == "transformer_blocks"):
            part.to(device)


def _frozen_matrices(blocks: list[nn.Module]) -> Iterator[Any]:
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear))
    return (layer for layer in layers if not layer.weight.requires_grad)


def _widened(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(COMPUTED), layer.bias)


def _share(transformer: Any, blocks: list[nn.Module], device: torch.device, shards: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, own = init_device_mesh(device.type, (shards,)), set(lora_parameters(transformer).values())
    for parameter in own:
        parameter.data = parameter.data.to(device)
    for part in (*blocks, transformer):
        fully_shard(part, mesh=mesh, ignored_params=own)


class Visits:
    """Blocks whose frozen weights stay in host memory. Two at most have them on the device: the one that runs, and the
    next, which is copied meanwhile. Nothing is ever copied back, since nothing of them changes.

    With checkpoints, the backward pass runs each block again before it needs its weights, so that what it needs is
    there. A block is left when another one is entered: its own backward pass is over then.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.device, self.last, self.here = device, -1, set[int]()
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.homes: list[list[tuple[nn.Parameter, Tensor]]] = []
        for i, block in enumerate(blocks):
            frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
            self.homes.append([(each, each.data.pin_memory() if self.side else each.data) for each in frozen])
            for parameter in block.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device)
            block.register_forward_pre_hook(partial(self._enter, i))

    def _enter(self, i: int, *_: object) -> None:
        following = i + (1 if i > self.last or i == 0 else -1)
        for other in self.here - {i, following}:
            for parameter, home in self.homes[other]:
                parameter.data = home
        self.here &= {i, following}
        self._bring(i)
        if self.side:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        if 0 <= following < len(self.homes):
            self._bring(following)
        self.last = i

    def _bring(self, i: int) -> None:
        if i in self.here:
            return
        self.here.add(i)
        if not self.side:
            for parameter, home in self.homes[i]:
                parameter.data = home.to(self.device, copy=True)
            return
        user = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.side):
            for parameter, home in self.homes[i]:
                parameter.data = home.to(self.device, non_blocking=True)
                parameter.data.record_stream(user)  # its memory is not given away before it was used
