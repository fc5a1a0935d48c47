"""Out of memory: which errors mean it, and one more try in another way.

PyTorch raises `torch.OutOfMemoryError` on GPUs alone. On a CPU it is a RuntimeError of the allocator, of a library
below it, or Python's own MemoryError; all of them are taken for the same here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

M = TypeVar("M")
T = TypeVar("T")
logger = logging.getLogger(__name__)

# What allocators say: PyTorch's on Linux and macOS, on Windows and on MPS; C++; and oneDNN, which computes convolutions
# on a CPU and says no more than this when it has no room for their code or their buffers.
_SAYINGS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "Cannot allocate memory",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory for something."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _SAYINGS)


def with_less_memory(work: Callable[[M], Iterator[T]], executions: Sequence[Callable[[], M]]) -> Iterator[T]:
    """What `work` gives by the first of these executions; where memory runs out, by the next, from its beginning.

    All that a failed try held is freed before anything else: an exception holds the locals of all frames it came
    through, so neither the next try nor the error that tells of the last one is made while it is handled.

    Raises:
        torch.OutOfMemoryError: there is no memory for the last one either, on whatever device.
    """
    said = ""
    for execution in executions:
        if said:
            logger.warning("Out of memory; once more in the way that takes least")
        try:
            yield from work(execution())
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error) or type(error).__name__
    raise torch.OutOfMemoryError(said)


def room_for(shape: Sequence[int], device: torch.device | str, what: str) -> Tensor:
    """An empty float32 tensor, of which nothing is in memory before it is written: where there is no room, it is said
    at once.

    Args:
        what: of what there is too much, and what to do; completes "N GB of …".

    Raises:
        MemoryError: there is none on a CPU.
        torch.OutOfMemoryError: there is none on a GPU; hosts know what to do then.
    """
    try:
        return torch.empty(tuple(shape), device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and not _overflows(shape):
            raise
        raise MemoryError(f"There is no memory for {4 * prod(shape) / 1e9:,.0f} GB of {what}") from None


def _overflows(shape: Sequence[int]) -> bool:
    return 4 * prod(shape) >= 1 << 63
