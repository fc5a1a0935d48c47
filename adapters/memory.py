"""Out of memory: which errors mean it, and one more try in another way.

PyTorch raises `torch.OutOfMemoryError` on GPUs alone. On a CPU it is a RuntimeError of the allocator, of a library
below it, or Python's own MemoryError; all of them are taken for the same here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

M = TypeVar("M")
T = TypeVar("T")
logger = logging.getLogger(__name__)

# in what the allocators of PyTorch say: on Linux and macOS, Windows, MPS, and where C++ itself runs out
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory for something."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _SAYINGS)


def with_less_memory(work: Callable[[M], Iterator[T]], methods: Sequence[Callable[[], M]]) -> Iterator[T]:
    """What `work` gives by the first of these methods; where memory runs out, by the next, from its beginning.

    All that a failed try held is freed before anything else: an exception holds the locals of all frames it came
    through, so neither the next try nor the error that tells of the last one is made while it is handled.

    Raises:
        torch.OutOfMemoryError: there is no memory for the last one either, on whatever device.
    """
    said = ""
    for method in methods:
        if said:
            logger.warning("Out of memory; once more in the way that takes least")
        try:
            yield from work(method())
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error) or type(error).__name__
    raise torch.OutOfMemoryError(said)
