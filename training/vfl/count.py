"""Count what a computation holds in memory at its peak, on tensors without data.

    with torch.device("meta"):
        model, x = Model(), torch.empty(1, 3, 512, 512)
    with counted() as count:
        model(x).mean().backward()
    count.peak

Every tensor that is alive is counted: what autograd saves, and what is needed for a moment. Workspaces of convolutions
and fragments of the allocator are not known here.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Count(TorchDispatchMode):
    """Adds up the storages that operations make, and subtracts them when they die.

    Attributes:
        now, peak: bytes that are alive, and the most that were. What was there before does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counts=False)
        made = function(*args, **kwargs)
        for tensor in _tensors(made):
            self._meet(tensor, counts=True)
        return made

    def _meet(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if counts else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._lose, key, size)

    def _lose(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def counted(autocast: torch.dtype | None = None) -> Iterator[Count]:
    """A context that counts, in which attention is computed as on GPUs, without its matrix.

    Args:
        autocast: computes as if within autocast of this dtype on a GPU, and widens matrices that are stored in less.
            PyTorch has no autocast for tensors without data.
    """
    patches: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": _attention}
    if autocast:
        linear, norm = F.linear, F.layer_norm

        def in_autocast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(x.to(autocast), weight.to(autocast), None if bias is None else bias.to(autocast))

        patches |= {"linear": in_autocast, "layer_norm": lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)}
    plain = {name: getattr(F, name) for name in patches}
    try:
        for name, function in patches.items():
            setattr(F, name, function)
        with Count() as count:
            yield count
    finally:
        for name, function in plain.items():
            setattr(F, name, function)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Memory-efficient attention, to which a mask is a bias in the dtype of the query; all [B, heads, n, width]."""
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, torch.is_grad_enabled())[0]


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def matmul_rate(device: torch.device, tokens: int, width: int) -> float:
    """Operations per second of a product of bfloat16 matrices, [tokens, width] by [width, 4 width], on a GPU."""
    a, b = (torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((tokens, width), (width, 4 * width)))
    repeats = 10
    for _ in range(3):  # until the clocks are up
        a @ b
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize(device)
    return repeats * 2 * tokens * width * 4 * width / (time.perf_counter() - start)
