"""A LoRA on diffusers' network of HunyuanVideo 1.5: added in float32, switched off for the teacher, taken out again.

add_lora(transformer, "published", rank=16, alpha=16, seed=0)
with base_of(transformer):      # the teacher: bit for bit the network before
    v = transformer(...)
write_lora(folder, "step-100", lora_of(transformer))
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kvae.errors import WeightsError
from .lora_files import peft_config
from .lora_pairs import Lora, Pair

ADAPTER = "default"  # diffusers' own name for the first adapter
_BLOCK = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MODULATION = r"norm1\.linear|norm1_context\.linear"
_OTHER_MODULATION = r"norm_out\.linear|context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"
# regular expressions of whole names: peft takes lists of names as endings, and attn.to_q is also in the text refiner
TARGETS = {
    "published": rf"{_BLOCK}({_ATTENTION}|{_MODULATION})|{_OTHER_MODULATION}",
    "attention": rf"{_BLOCK}{_ATTENTION}",
    "all": rf"{_BLOCK}({_ATTENTION}|{_MODULATION}|{_FEED_FORWARD})|{_OTHER_MODULATION}",
}


def add_lora(transformer: Any, targets: str, rank: int, alpha: float, seed: int = 0) -> None:
    """Add a fresh LoRA, A random and B zero, and freeze everything else. It changes nothing yet.

    Args:
        targets: a key of TARGETS.
        seed: of A, which depends on nothing else.

    Raises:
        WeightsError: the network has none of these layers.
    """
    names = [name for name, _ in transformer.named_modules() if re.fullmatch(TARGETS[targets], name)]
    if not names:
        raise WeightsError(
            f"{type(transformer).__name__} has none of the layers that a LoRA of HunyuanVideo 1.5 changes"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _add(transformer, {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": TARGETS[targets]})


def put_lora(transformer: Any, lora: Lora) -> None:
    """Add a LoRA with these weights, ranks and alphas, and freeze everything else.

    Raises:
        WeightsError: the network lacks one of the layers, or it has another size.
    """
    modules = dict(transformer.named_modules())
    for name, pair in lora.items():
        if not isinstance(modules.get(name), nn.Linear):
            raise WeightsError(
                f"the LoRA changes {name}, which this network lacks; expected a LoRA of HunyuanVideo 1.5"
            )
        expected, found = modules[name].weight.shape, (pair.b.shape[0], pair.a.shape[1])
        if tuple(expected) != found:
            raise WeightsError(
                f"the LoRA's {name} is {list(found)}, the network's {list(expected)}; not of this network"
            )
    _add(transformer, peft_config(lora) | {"target_modules": "|".join(map(re.escape, lora))})
    with torch.no_grad():
        for name, layer in lora_layers(transformer):
            layer.lora_A[ADAPTER].weight.copy_(lora[name].a)
            layer.lora_B[ADAPTER].weight.copy_(lora[name].b)


def lora_of(transformer: Any) -> Lora:
    """The LoRA of a network, as float32 copies on the CPU."""
    return {
        name: Pair(_copy(layer.lora_A[ADAPTER]), _copy(layer.lora_B[ADAPTER]), layer.lora_alpha[ADAPTER])
        for name, layer in lora_layers(transformer)
    }


def lora_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """A and B of every layer, by names that do not depend on peft, in the order of the network."""
    found = {}
    for name, layer in lora_layers(transformer):
        found[f"{name}.a"] = layer.lora_A[ADAPTER].weight
        found[f"{name}.b"] = layer.lora_B[ADAPTER].weight
    return found


@contextmanager
def base_of(transformer: Any) -> Iterator[None]:
    """Within this context, the network is its base."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def fill_gradients(parameters: Iterator[nn.Parameter]) -> None:
    """Give zeros to what has no gradient: the last block's text is not used, so what only it sees gets none."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _add(transformer: Any, config: dict[str, Any]) -> None:
    from peft import LoraConfig

    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(**config), ADAPTER)
    for _, layer in lora_layers(transformer):
        for each in (layer.lora_A, layer.lora_B):
            # peft takes the dtype of the base: in bfloat16, most steps of 1e-4 would be lost in rounding
            each[ADAPTER].to(torch.float32).requires_grad_(True)


def lora_layers(transformer: Any) -> Iterator[tuple[str, Any]]:
    """Yield peft's layers, by their names."""
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer))


def _copy(layer: nn.Linear) -> Tensor:
    return layer.weight.detach().to("cpu", torch.float32, copy=True)
