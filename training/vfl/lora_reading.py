"""Read a LoRA of HunyuanVideo 1.5 that any of four programs wrote.

found = read_lora(Path("character.safetensors"))
print(found.about())        # format comfyui, 543 layers, rank 16, alpha 16
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kvae.errors import WeightsError
from ...kvae.files import Weights, what_is
from ...kvae.finite import all_finite
from ...kvae.foreign import parse_object
from .lora_files import FORMATS, PEFT_FILE, PEFT_METADATA
from .lora_names import in_diffusers, in_tencent
from .lora_pairs import Lora, Pair, halves_swapped, split

_KINDS = {
    ".lora_A.weight": "a", ".lora_down.weight": "a", ".lora_B.weight": "b", ".lora_up.weight": "b", ".alpha": "alpha",
}  # fmt: skip
_NOT_PLAIN = ("use_dora", "use_rslora", "lora_bias")  # settings of peft under which a layer changes in another way


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, and the format that it was found in."""

    format: str
    layers: Lora

    def about(self) -> str:
        """The format, and what is in it, in a few words."""
        ranks, alphas = ({getattr(pair, key) for pair in self.layers.values()} for key in ("rank", "alpha"))
        said = [_span(name, values) for name, values in (("rank", ranks), ("alpha", alphas))]
        return f"format {self.format}, {len(self.layers)} layers, {', '.join(said)}"


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA of any of the formats: a file, or peft's folder.

    Raises:
        WeightsError: it is something else, a value is not finite, or no layer of HunyuanVideo 1.5 has such a name.
    """
    path = lora_file(path)
    weights = Weights(path)
    format = _format_of(path, weights)
    config = _config(path, weights.metadata)
    lora: Lora = {}
    for layer, keys in _grouped(path, weights, FORMATS[format]).items():
        pair = _pair(path, weights, keys)
        try:
            lora |= _in_diffusers(layer, pair, config, format in ("peft", "diffusers"))
        except KeyError:
            raise WeightsError(f"{path}: {layer} is no layer of HunyuanVideo 1.5 that a LoRA may change") from None
    _check_patterns(path, config, lora)
    return LoraFile(format, lora)


def lora_file(path: Path) -> Path:
    """The file of a LoRA: the path itself, or the file in a folder of peft."""
    return path / PEFT_FILE if path.is_dir() else path


def _format_of(path: Path, weights: Weights) -> str:
    keys = list(weights.shapes)
    for format, prefix in reversed(FORMATS.items()):  # that of peft is empty
        if keys and all(key.startswith(prefix) for key in keys) and any(key.endswith(tuple(_KINDS)) for key in keys):
            return format
    raise WeightsError(
        f"{path}: this is {what_is(keys)}; expected a LoRA of peft, diffusers, musubi-tuner or ComfyUI, whose "
        f"keys start with {', '.join(prefix for prefix in FORMATS.values() if prefix)}, or with a layer's name"
    )


def _grouped(path: Path, weights: Weights, prefix: str) -> dict[str, dict[str, str]]:
    """Layers → the keys of A, B and alpha, of which every layer has the first two."""
    layers: dict[str, dict[str, str]] = {}
    for key in weights.shapes:
        ending = next((ending for ending in _KINDS if key.endswith(ending)), None)
        if ending is None:
            raise WeightsError(f"{path}: {key} is not part of a plain LoRA, which has A, B and alpha only")
        layers.setdefault(key.removeprefix(prefix).removesuffix(ending), {})[_KINDS[ending]] = key
    for layer, keys in layers.items():
        if not {"a", "b"} <= keys.keys():
            raise WeightsError(f"{path}: {layer} lacks A or B; download or make the file again")
    return layers


def _pair(path: Path, weights: Weights, keys: dict[str, str]) -> Pair:
    """The pair of a layer, with alpha = r where the file has none: so do all programs read it."""
    a, b = weights.shapes[keys["a"]], weights.shapes[keys["b"]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise WeightsError(f"{path}: {keys['a']} is {list(a)} and {keys['b']} {list(b)}; expected [r, in] and [out, r]")
    found = {kind: weights[key] for kind, key in keys.items()}
    alpha = found.setdefault("alpha", torch.tensor(a[0])).float()
    for kind, tensor in (("a", found["a"]), ("b", found["b"]), ("alpha", alpha)):
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise WeightsError(f"{path}: {keys[kind]} holds values that are not finite numbers; make the file again")
    if alpha.numel() != 1 or not alpha:
        raise WeightsError(f"{path}: {keys['alpha']} is {list(alpha.shape)}; expected one number other than 0")
    return Pair(found["a"].float(), found["b"].float(), alpha.item())


def _in_diffusers(layer: str, pair: Pair, config: dict[str, Any], ours: bool) -> Lora:
    """The pair or pairs of a file's layer, by the names of diffusers.

    Raises:
        KeyError: no network has this layer.
    """
    if ours:
        in_tencent(layer)
        return {layer: Pair(pair.a, pair.b, _alpha(layer, config, pair.alpha))}
    names, swapped = in_diffusers(layer)
    pair = halves_swapped(pair) if swapped else pair
    return dict(zip(names, split(pair) if len(names) > 1 else [pair], strict=True))


def _config(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The config of peft in the metadata; empty if there is none.

    Raises:
        WeightsError: it is not such a config, or its layers change in another way than by alpha / r · B A.
    """
    try:
        found = parse_object(metadata.get(PEFT_METADATA, "{}"))
        config = {key.removeprefix("transformer."): value for key, value in found.items()}
        patterns = config.get("alpha_pattern") or {}
        alphas = [config.get("lora_alpha", 1), *patterns.values()]
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: its {PEFT_METADATA} is not a config of peft ({error})") from None
    for alpha in alphas:
        if type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e6:
            raise WeightsError(f"{path}: an alpha in its metadata is {str(alpha)[:40]}; expected a number other than 0")
    for key in _NOT_PLAIN:
        if config.get(key):
            raise WeightsError(f"{path}: it was made with {key}; expected a plain LoRA")
    return config | {"alpha_pattern": {_literal(pattern): alpha for pattern, alpha in patterns.items()}}


def _literal(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern)


def _alpha(layer: str, config: dict[str, Any], default: float) -> float:
    """The alpha of a layer by peft's config: a pattern is the end of a name, or all of it after a ^."""
    for pattern, alpha in config["alpha_pattern"].items():
        if _fits(pattern, layer):
            return float(alpha)
    return float(config.get("lora_alpha", default))


def _fits(pattern: str, layer: str) -> bool:
    return f"^{layer}" == pattern or f".{layer}".endswith(f".{pattern}")


def _check_patterns(path: Path, config: dict[str, Any], lora: Lora) -> None:
    for pattern in config["alpha_pattern"]:
        if not any(_fits(pattern, layer) for layer in lora):
            raise WeightsError(f"{path}: the alpha_pattern {pattern[:80]} in its metadata fits none of its layers")


def _span(name: str, values: set[float]) -> str:
    low, high = min(values), max(values)
    return f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
