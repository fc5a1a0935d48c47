"""The processes that `accelerate launch` started, or this one alone.

accelerate launch --num_processes 8 -m training extract …
accelerate launch --num_processes 8 --mixed_precision bf16 --gradient_accumulation_steps 2 -m training train …
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


class Processes:
    """Which of how many this is, and what they do together.

    Args:
        device: what the user asked for; with several processes each one takes the device that accelerate gives it.

    Raises:
        UserError: accelerate was told to compute in a precision that is not to be had here.
    """

    def __init__(self, device: str):
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=device == "cpu")
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.main = self.rank == 0
        self.device = torch.device(device) if self.count == 1 else self._accelerator.device
        self.accumulation: int = self._accelerator.gradient_accumulation_steps
        self._precision = self._accelerator.mixed_precision
        if self._precision not in ("no", "bf16"):
            raise UserError(f"--mixed_precision is {self._precision}; expected no or bf16, which needs no loss scaling")

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.main:
            print(text, flush=True)

    def wait(self) -> None:
        """Until all have come here."""
        self._accelerator.wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order, in each of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in each of them."""
        if self.count == 1:
            return tensor
        return self._accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)

    def autocast(self) -> AbstractContextManager:
        """Where matrix products and convolutions run in accelerate's mixed precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16")
