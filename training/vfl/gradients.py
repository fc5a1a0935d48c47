"""The gradients of the samples of a step, added so that it hardly matters who computed which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..runtime.processes import Processes


class GradientSum:
    """A sum in float64, where a few float32 add up nearly without rounding: any number of processes gives one result.

    sum = GradientSum(parameters)
    for sample in samples:
        loss(sample).backward()
        sum.take()
    numbers = sum.give(processes, numbers)
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters, self.total = list(parameters), torch.zeros(0)

    def take(self) -> None:
        """Add the present gradients, and clear them. A parameter without a gradient counts as zero."""
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        flat = flat.cpu() if flat.device.type == "mps" else flat  # which has no float64
        self.total = self.total + flat.double() if len(self.total) else flat.double()
        for parameter in self.parameters:
            parameter.grad = None

    def give(self, processes: Processes, numbers: Tensor) -> Tensor:
        """Give the parameters the sum over all processes, in one message; return the sum of a float64 vector."""
        message = processes.add(torch.cat([self.total, numbers.to(self.total)]))
        *parts, numbers = message.split([*(p.numel() for p in self.parameters), len(numbers)])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        self.total = torch.zeros(0)
        return numbers
