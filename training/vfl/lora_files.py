"""LoRA files of HunyuanVideo 1.5 for four programs. `lora_reading` reads any of them.

    write_lora(Path("folder"), "character", lora)       # character.comfyui.safetensors and three more

    peft        NAME.peft/pytorch_lora_weights.safetensors      layers of diffusers; alpha in the metadata
    diffusers   NAME.diffusers.safetensors                      the same with "transformer."; alpha / r is part of B
    musubi      NAME.musubi.safetensors                         Tencent's layers, with underscores
    comfyui     NAME.comfyui.safetensors                        ComfyUI's layers; q, k and v are one

The scale of a layer is alpha / r in all of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kvae.files import save_weights
from .lora_names import in_comfyui, in_tencent
from .lora_pairs import Lora, Pair, fused, halves_swapped

PEFT_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it in a folder
PEFT_METADATA = "lora_adapter_metadata"  # the key under which diffusers keeps peft's config
FORMATS = {"peft": "", "diffusers": "transformer.", "musubi": "lora_unet_", "comfyui": "diffusion_model."}  # prefixes


def lora_path(folder: Path, name: str, format: str) -> Path:
    """Where `write_lora` writes a format."""
    return folder / f"{name}.peft" / PEFT_FILE if format == "peft" else folder / f"{name}.{format}.safetensors"


def write_lora(
    folder: Path, name: str, lora: Lora, formats: Iterable[str] = FORMATS, about: Mapping[str, str] | None = None
) -> list[Path]:
    """Write a LoRA in some formats, each file completely or not at all; returns the files.

    Args:
        about: texts for the metadata.

    Raises:
        WeightsError: a file cannot be written.
    """
    paths = []
    for format in formats:
        paths.append(lora_path(folder, name, format))
        metadata = {"format": "pt", **(about or {})}
        if format == "peft":
            metadata[PEFT_METADATA] = json.dumps(peft_config(lora), sort_keys=True)
        save_weights(paths[-1], lora_state(lora, format), metadata)
    return paths


def lora_state(lora: Lora, format: str) -> dict[str, Tensor]:
    """The tensors of a file."""
    if format in ("peft", "diffusers"):
        folded = {name: Pair(p.a, p.b * p.scale, p.rank) if format == "diffusers" else p for name, p in lora.items()}
        return _state(folded, FORMATS[format], ("lora_A", "lora_B"), alpha=False)
    if format == "musubi":
        renamed = {}
        for name, pair in lora.items():
            there = in_tencent(name)
            renamed[there.name.replace(".", "_")] = halves_swapped(pair) if there.swapped else pair
        return _state(renamed, FORMATS[format], ("lora_down", "lora_up"))
    return _state(_comfyui(lora), FORMATS[format], ("lora_A", "lora_B"))


def _state(layers: Lora, prefix: str, names: tuple[str, str], alpha: bool = True) -> dict[str, Tensor]:
    state = {}
    for layer, pair in layers.items():
        state[f"{prefix}{layer}.{names[0]}.weight"] = pair.a
        state[f"{prefix}{layer}.{names[1]}.weight"] = pair.b
        if alpha:
            state[f"{prefix}{layer}.alpha"] = torch.tensor(float(pair.alpha))
    return state


def peft_config(lora: Lora) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for these layers."""
    (rank, alpha), _ = Counter((pair.rank, pair.alpha) for pair in lora.values()).most_common(1)[0]
    # peft searches a pattern in the end of a name, so that a short name would also be found in a longer one
    ranks = {f"^{re.escape(name)}": pair.rank for name, pair in lora.items() if pair.rank != rank}
    alphas = {f"^{re.escape(name)}": pair.alpha for name, pair in lora.items() if pair.alpha != alpha}
    return {
        "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "lora_dropout": 0.0,
        "bias": "none", "target_modules": targets_of(lora),
    }  # fmt: skip


def targets_of(names: Iterable[str]) -> str:
    """A regular expression of the names, with any number in the place of a block's."""
    return "|".join(sorted({re.sub(r"(blocks\\\.)\d+", r"\1\\d+", re.escape(name)) for name in names}))


def _comfyui(lora: Lora) -> Lora:
    layers: Lora = {}
    parts: dict[str, dict[int, Pair]] = {}
    for name, pair in lora.items():
        there = in_comfyui(name)
        if there.part is None:
            layers[there.name] = halves_swapped(pair) if there.swapped else pair
        else:
            parts.setdefault(there.name, {})[there.part] = pair
    return layers | {name: fused(found) for name, found in parts.items()}
