"""Out of memory: recognise it, and try again with less.

PyTorch raises `torch.OutOfMemoryError` only on GPUs. On a CPU it is a RuntimeError of the allocator or of a library
below it, or Python's MemoryError. Here they are all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Messages of allocators: PyTorch's on Linux and macOS, on Windows and on MPS; C++'s; and oneDNN's, which computes
# convolutions on a CPU and says no more than this if it has no memory for their code or their buffers.
_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "Cannot allocate memory",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _MESSAGES)


def with_less_memory(work: Callable[[], Iterator[T]], step_down: Callable[[], object]) -> Iterator[T]:
    """Yield from `work`; if memory runs out, call `step_down`, and yield from `work` again, from its beginning.

    The tensors of a failed try are freed before that. An exception holds the locals of all frames that it passed, so
    neither the next try nor the final error is made while the exception is handled.

    Args:
        step_down: chooses how to work in less memory, and returns its description, or None if there is no other way.

    Raises:
        torch.OutOfMemoryError: there is not enough memory for the last way either, on any device.
    """
    while True:
        try:
            yield from work()
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error) or type(error).__name__
        way = step_down()
        if way is None:
            raise torch.OutOfMemoryError(said)
        logger.warning("Out of memory; trying again with %s", way)


def room_for(shape: Sequence[int], device: torch.device | str, what: str) -> Tensor:
    """Allocate an uninitialised float32 tensor, so that a lack of memory shows at once.

    On a CPU, its pages use no memory until they are written.

    Args:
        what: what the tensor is for, and what to do if it does not fit; completes "N GB of …".

    Raises:
        MemoryError: not enough memory on a CPU.
        torch.OutOfMemoryError: not enough memory on a GPU; hosts handle this error.
    """
    try:
        return torch.empty(tuple(shape), device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and not _overflows(shape):
            raise
        raise MemoryError(f"There is no memory for {4 * prod(shape) / 1e9:,.0f} GB of {what}.") from None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a GPU of CUDA; None, which is no limit, elsewhere."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _overflows(shape: Sequence[int]) -> bool:
    return 4 * prod(shape) >= 1 << 63
