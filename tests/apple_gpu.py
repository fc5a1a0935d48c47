"""A stand-in for Apple's GPU, on any machine: tensors that report the device "mps", and hold their values on the CPU.

    with AppleGPU():
        kvae = load_kvae(path, device="mps")
        z = kvae.encode(x.to("mps")).cpu()

Code takes the path that it would take on a Mac, and gives the values of a CPU. What Apple's GPU does not do, or does
wrongly in a version of PyTorch or macOS that people use, raises a `NotOnApple`:

- float64;
- an operator without a kernel for MPS. PyTorch's own list of operators says which have one;
- tensors on the CPU among those on the GPU, and copies between the two that the CPU does not wait for, whose memory may
  be freed too early;
- a convolution with channels last, in its input or its weights, or with weights that are not contiguous, which PyTorch
  has read wrongly: pytorch/pytorch#141780, #192212;
- an operator, other than a plain copy, that writes to memory that is not contiguous: #118115 (addcmul), #139006 (SiLU),
  #145203 (bitwise operators).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchgen
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MPS, CPU = torch.device("mps", 0), torch.device("cpu")
aten = torch.ops.aten
PLAIN_WRITES = {aten.copy_, aten.fill_, aten.zero_, aten.index_put_, aten._index_put_impl_}
READ_CPU_TENSORS = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class NotOnApple(AssertionError):
    """Apple's GPU cannot do this, or may do it wrongly."""


class OnApple(Tensor):
    """A tensor that reports the device "mps".

    Attributes:
        values: on the CPU.
    """

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # the default makes every result an OnApple

    @staticmethod
    def __new__(cls, values: Tensor) -> OnApple:
        options = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        # autograd needs a device that this PyTorch was built for, so below Python it is the meta device
        tensor = Tensor._make_wrapper_subclass(cls, values.shape, **options, device="meta")
        tensor.values = values.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    device = property(lambda self: MPS)  # type: ignore[assignment]
    is_mps = property(lambda self: True)
    is_meta = property(lambda self: False)

    def new_tensor(self, data: Any) -> Tensor:
        return OnApple(torch.tensor(data, dtype=self.dtype))

    def tolist(self) -> Any:
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def __repr__(self) -> str:
        return f"OnApple({self.values})"


class AppleGPU(TorchDispatchMode):
    """A context in which the stand-in is there, in the thread that entered it.

    Attributes:
        operators: the names of the operators that have run on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __enter__(self):
        self._contexts = ExitStack()
        self._contexts.enter_context(Numbered())
        # otherwise `module.to` would put the values of the new tensor into the old one
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._contexts.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        # inference mode would hide the operators that a composite of them runs
        mode, no_grad = torch.inference_mode, torch.no_grad
        self._contexts.enter_context(patch.multiple(mode, __enter__=no_grad.__enter__, __exit__=no_grad.__exit__))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._contexts.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.operators)


class Numbered(TorchFunctionMode):
    """Read the device "mps" as "mps:0". A PyTorch without Apple's GPU cannot look up the number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [numbered(each) for each in args]
        kwargs = {key: numbered(each) for key, each in (kwargs or {}).items()}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnApple):
            # PyTorch would make tensors of lists on the meta device
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args[1] = tuple(torch.tensor(each) if isinstance(each, list) else each for each in index)
        return func(*args, **kwargs)


def numbered(value: Any) -> Any:
    """A device "mps" with its number, anything else as it is."""
    return MPS if isinstance(value, str | torch.device) and str(value) == "mps" else value


def changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value, or a list or dict of values, with each tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(each, change) for key, each in value.items()}
    return type(value)(changed(each, change) for each in value) if type(value) in (list, tuple) else value


def run(func: Any, args: tuple, kwargs: dict, operators: set[str] | None = None) -> Any:
    """The result of an operator, on the device where PyTorch would leave it."""
    tensors: list[Tensor] = []
    changed((args, kwargs), tensors.append)
    on_apple = [each for each in tensors if isinstance(each, OnApple)]
    target = args[0].device if func.overloadpacket is aten.copy_ else asked_for(kwargs.get("device"))
    if not on_apple and target != MPS:
        return func(*args, **kwargs)
    if operators is not None and target in (None, MPS):
        operators.add(func.name())
    if kwargs.get("non_blocking") or (func.overloadpacket is aten.copy_ and len(args) > 2 and args[2]):
        raise NotOnApple(f"{func}: a copy that the CPU does not wait for")
    if on_apple:
        check(func, args, kwargs, tensors)
    on_cpu = changed((args, kwargs), lambda each: each.values if isinstance(each, OnApple) else each)
    if "device" in kwargs:
        on_cpu[1]["device"] = CPU
    wrapped = {id(each.values): each for each in on_apple}

    def place(result: Tensor) -> Tensor:
        if id(result) in wrapped or target == CPU:  # written in place, or moved away
            return wrapped.get(id(result), result)
        if result.dtype == torch.float64:
            raise NotOnApple(f"{func}: float64")
        return OnApple(result)

    return changed(func(*on_cpu[0], **on_cpu[1]), place)


def asked_for(device: Any) -> torch.device | None:
    """The device that a call asks for. PyTorch itself asks for the meta device where it means that of an OnApple."""
    if device is None:
        return None
    itself = torch.device(device).type == "meta" and torch.get_default_device().type != "meta"
    return MPS if itself else torch.device(device)


def check(func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    """Raise unless Apple's GPU can run this operator.

    Raises:
        NotOnApple: it cannot.
    """
    packet = func.overloadpacket
    if not has_kernel(func.name().removeprefix("aten::")):
        raise NotOnApple(f"{func}: no kernel for MPS")
    strangers = [each for each in tensors if not isinstance(each, OnApple) and each.ndim]
    assert not any(each.is_meta for each in strangers), f"{func}: PyTorch made a tensor on the meta device"
    if strangers and packet not in READ_CPU_TENSORS:
        raise NotOnApple(f"{func}: {[list(each.shape) for each in strangers]} on the CPU")
    if packet in (aten.convolution, aten.convolution_backward):
        *others, weight = (each.values for each in args[: 2 + (packet is aten.convolution_backward)])
        channels_last = any(x.shape[1] > 1 == x.stride(1) and not x.is_contiguous() for x in others)
        if channels_last or not weight.is_contiguous():
            raise NotOnApple(f"{func}: strides {[each.stride() for each in (*others, weight)]}")
    if packet in PLAIN_WRITES:
        return
    for argument, value in zip(func._schema.arguments, args, strict=False):
        check_written(func, argument, value)
    for argument in func._schema.arguments:
        check_written(func, argument, kwargs.get(argument.name))


def check_written(func: Any, argument: Any, value: Any) -> None:
    """Raise if an operator writes to memory that is not contiguous."""
    if argument.is_write and isinstance(value, OnApple) and not value.values.is_contiguous():
        raise NotOnApple(f"{func}: writes to {list(value.shape)} with strides {value.stride()}")


@cache
def has_kernel(name: str) -> bool:
    """Whether an operator runs on MPS: by a kernel of its own, or as a composite of others."""
    block = native_functions().get(name)
    if block is None:
        return False
    delegate = re.search(r"structured_delegate: (\S+)", block)
    if delegate:
        return has_kernel(delegate[1])
    keys = re.findall(r"^    ([\w, ]+):", block.partition("\n  dispatch:")[2], re.MULTILINE)
    return not keys or any("MPS" in each or "Composite" in each for each in keys)


@cache
def native_functions() -> dict[str, str]:
    """The entry of each of PyTorch's operators in its own list of them, by name."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    blocks = re.split(r"^- func: ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {block.partition("(")[0].strip(): block for block in blocks}
