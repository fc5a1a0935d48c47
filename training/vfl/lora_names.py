"""The names of HunyuanVideo 1.5's layers in diffusers, in Tencent's code (so in musubi-tuner) and in ComfyUI.

ComfyUI's network has one layer in the place of three of diffusers: q, k and v. The final modulation of diffusers gives
scale and shift, that of the others shift and scale.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Layer(NamedTuple):
    """A layer of diffusers' network in another network.

    Attributes:
        name: of the layer there.
        part: 0 to 2 for the first to the third of three layers that are one there; None otherwise.
        swapped: whether the two halves of its outputs are the other way round there.
    """

    name: str
    part: int | None = None
    swapped: bool = False


# of a block: diffusers, Tencent, ComfyUI
_STREAMS = (
    ("attn.to_q", "img_attn_q", "img_attn.qkv"),
    ("attn.to_k", "img_attn_k", "img_attn.qkv"),
    ("attn.to_v", "img_attn_v", "img_attn.qkv"),
    ("attn.to_out.0", "img_attn_proj", "img_attn.proj"),
    ("norm1.linear", "img_mod.linear", "img_mod.lin"),
    ("ff.net.0.proj", "img_mlp.fc1", "img_mlp.0"),
    ("ff.net.2", "img_mlp.fc2", "img_mlp.2"),
    ("attn.add_q_proj", "txt_attn_q", "txt_attn.qkv"),
    ("attn.add_k_proj", "txt_attn_k", "txt_attn.qkv"),
    ("attn.add_v_proj", "txt_attn_v", "txt_attn.qkv"),
    ("attn.to_add_out", "txt_attn_proj", "txt_attn.proj"),
    ("norm1_context.linear", "txt_mod.linear", "txt_mod.lin"),
    ("ff_context.net.0.proj", "txt_mlp.fc1", "txt_mlp.0"),
    ("ff_context.net.2", "txt_mlp.fc2", "txt_mlp.2"),
)
_REFINER = "txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1"
_FINAL = "final_layer.adaLN_modulation.1"
_ROWS = [(f"transformer_blocks.#.{ours}", *(f"double_blocks.#.{name}" for name in names)) for ours, *names in _STREAMS]
_ROWS.append(("norm_out.linear", _FINAL, _FINAL))
_ROWS.append(("context_embedder.token_refiner.refiner_blocks.#.norm_out.linear", _REFINER, _REFINER))
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")  # the first in a name is that of its block
_OURS = {ours: (tencent, comfyui) for ours, tencent, comfyui in _ROWS}
_IN_ONE = {comfyui: [ours for ours, _, theirs in _ROWS if theirs == comfyui] for _, _, comfyui in _ROWS}
_THEIRS = {name.replace(".", "_"): ours for name, ours in _IN_ONE.items()}
_THEIRS |= {tencent.replace(".", "_"): [ours] for ours, tencent, _ in _ROWS}


def in_tencent(name: str) -> Layer:
    """A layer of diffusers in Tencent's network.

    Raises:
        KeyError: the table lacks it.
    """
    pattern, number = _pattern(name)
    return Layer(_OURS[pattern][0].replace("#", number), swapped=pattern == "norm_out.linear")


def in_comfyui(name: str) -> Layer:
    """A layer of diffusers in ComfyUI's network.

    Raises:
        KeyError: the table lacks it.
    """
    pattern, number = _pattern(name)
    theirs = _OURS[pattern][1]
    part = _IN_ONE[theirs].index(pattern) if len(_IN_ONE[theirs]) > 1 else None
    return Layer(theirs.replace("#", number), part, pattern == "norm_out.linear")


def in_diffusers(name: str) -> tuple[list[str], bool]:
    """A layer of either other network → the layer of diffusers, or the three; and whether its halves are swapped.

    Args:
        name: with dots, or with underscores in their place.

    Raises:
        KeyError: the table lacks it.
    """
    pattern, number = _pattern(name)
    found = _THEIRS[pattern.replace(".", "_")]
    return [each.replace("#", number) for each in found], found == ["norm_out.linear"]


def _pattern(name: str) -> tuple[str, str]:
    """A name → the name with # for the number of its block, and the number."""
    found = _NUMBER.search(name)
    return (name, "") if found is None else (name[: found.start()] + "#" + name[found.end() :], found[0])
