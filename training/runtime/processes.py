"""The processes that run one command together, or this process alone.

torchrun --nproc_per_node 8 -m training extract …
ACCELERATE_MIXED_PRECISION=bf16 torchrun --nproc_per_node 8 -m training train …
accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 -m training train …
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

# A process may wait for another that extracts a last long video, or packs alone. PyTorch's own 10 minutes would end the
# run. Of a process that was killed, torchrun and accelerate tell the others at once.
PATIENCE = timedelta(days=1)


class Processes:
    """This process among those that run the command, and their communication.

    Args:
        device: the user's choice; with several processes, each uses the device that accelerate assigns to it.

    Raises:
        UserError: accelerate was told to compute in a precision other than float32 or bfloat16, or there are more
            processes than GPUs.
    """

    def __init__(self, device: str):
        from accelerate import Accelerator, InitProcessGroupKwargs

        _check_devices(device)
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        self._accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.main = self.rank == 0
        self.device = torch.device(device) if self.count == 1 else self._accelerator.device
        self.accumulation: int = self._accelerator.gradient_accumulation_steps
        self._precision = self._accelerator.mixed_precision
        if self._precision not in ("no", "bf16"):
            raise UserError(f"--mixed_precision is {self._precision}; expected no or bf16, which needs no loss scaling")
        if self.count > 1:
            devices = [str(each) for each in self.gather(str(self.device))]
            self.say(f"{self.count} processes, on {', '.join(devices)}")
        elif "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # set by accelerate's launcher
            self.say(
                "accelerate launch started one process. With --multi_gpu it starts as many as --num_processes says, as "
                "does `torchrun --nproc_per_node 8 -m training …`"
            )

    def say(self, text: str) -> None:
        """Print in the first process only."""
        if self.main:
            print(text, flush=True)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self._accelerator.wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order, in each process."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in each process."""
        if self.count == 1:
            return tensor
        return self._accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)

    def add_gradients(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Sum the gradients of these parameters over the processes, in place; return the sum of a float32 vector.

        All of them travel in one message, which suits small models. A parameter without a gradient counts as zero.
        """
        if self.count == 1:
            return numbers
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.add(torch.cat([*(gradient.flatten() for gradient in gradients), numbers]))
        *parts, numbers = total.split([*(p.numel() for p in parameters), len(numbers)])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p).clone()
        return numbers

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite these float32 tensors with those of the first process, in one message."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(self.device)
        parts = broadcast(flat, from_process=0).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def autocast(self) -> AbstractContextManager:
        """A context in which matrix products and convolutions run in accelerate's mixed precision."""
        if self._precision == "no":  # before PyTorch 2.5, autocast refuses Apple's GPU even if it is not enabled
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def leave() -> None:
    """Leave the other processes, at the end of a command: threads of a group that is still there may abort the exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_devices(device: str) -> None:
    """Refuse more processes than GPUs: accelerate assigns a device to each process without checking.

    Raises:
        UserError: there are more processes than GPUs.
    """
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if local > 1 and device != "cpu" and 0 < gpus < local:
        raise UserError(f"{local} processes for {gpus} GPUs; start one process for each GPU, or use --device cpu")
