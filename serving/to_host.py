"""Copy decoded parts from a CUDA device to the host while the next segment is computed.

The copy of a segment runs on its own stream, into pinned memory, and is waited for only after the next segment has been
launched. So each part comes one segment late, and the device holds one more segment of frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kvae.engine.tiles import Part

Arrive = Callable[[], Tensor]  # waits for a copy, and returns it


def to_host(parts: Iterator[Part], source: torch.device) -> Iterator[Part]:
    """The same parts, float32 on the CPU, each one segment late, and valid until the next one is asked for.

    Args:
        parts: float32, on `source`, a CUDA device.

    Raises:
        What computing a part raises, after the parts before it have come.
    """
    return one_late(parts, PinnedCopies(source).start)


def one_late(parts: Iterator[Part], start: Callable[[Tensor], Arrive]) -> Iterator[Part]:
    """Start the copy of each part as it is computed, and yield it after the next one has been computed, or has failed.

    Args:
        start: starts a copy. It is called again only after the copy before the last one has been used.
    """
    coming: deque[Callable[[], Part]] = deque()  # two at most
    try:
        for part in parts:
            coming.append(partial(_landed, start(part.x), part.where, part.weights))
            del part  # before the next one is computed
            if len(coming) > 1:
                yield coming.popleft()()
    except (RuntimeError, MemoryError):  # memory may have run out; what was computed before that is not lost
        while coming:
            yield coming.popleft()()
        raise
    else:
        while coming:
            yield coming.popleft()()
    finally:
        for land in coming:  # the reader has stopped: no copy may outlive its source
            land()


def _landed(arrive: Arrive, where: tuple[slice, ...], weights: Tensor | None) -> Part:
    return Part(arrive(), where, weights)


class PinnedCopies:
    """Copies to the host that run while `device` computes. Two buffers of pinned memory are used in turn."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers: deque[Tensor] = deque([torch.empty(0), torch.empty(0)])

    def start(self, x: Tensor) -> Arrive:
        """Start to copy x, float32. Without pinned memory, copy it at once."""
        x = x.contiguous()
        try:
            buffer = self._buffer(x.numel()).view(x.shape)
        except RuntimeError:  # the system pins no more
            copy = x.cpu()
            return lambda: copy
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(x, non_blocking=True)
            done = self.stream.record_event()
        return partial(_arrived, done, buffer, x)

    def _buffer(self, size: int) -> Tensor:
        """The buffer that was used before the last one; a larger one if it is too small for `size` values."""
        if self.buffers[0].numel() < size:
            self.buffers[0] = torch.empty(0)  # goes back to PyTorch before a new one is made
            self.buffers[0] = torch.empty(size, pin_memory=True)
        self.buffers.rotate()
        return self.buffers[-1][:size]


def _arrived(done: torch.cuda.Event, buffer: Tensor, source: Tensor) -> Tensor:
    """The copy in `buffer`, once it is complete. `source` must live until then."""
    done.synchronize()
    return buffer
