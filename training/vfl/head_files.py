"""Files of identity heads: safetensors, with all that says how to use them.

weights   net.<i>.weight, net.<i>.bias, float32; i counts the layers of `identity.Head`
metadata  format, and JSON: "head" (how to build it), "backbone", "input", "metrics", "training"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kvae.files import Weights, save_weights
from ...kvae.foreign import build, json_text, parse_object
from ..errors import UserError
from .identity import ACTIVATIONS, MEAN, STD, Backbone, Head

FORMAT = "kvae-identity-head/1"
MOST_VALUES = 1 << 26  # of a head; that of DINOv3 7B has 2.2 million
KINDS = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H+", 4096: "ViT-7B"}  # of DINOv3, by D


@dataclass(frozen=True)
class Shape:
    """How to build a head."""

    dims: tuple[int, ...]
    activation: str
    layernorm: bool


@dataclass(frozen=True)
class Made:
    """What a head was made for, and how.

    Attributes:
        backbone: name, SHA-256 hash of its weights, D.
        side: of the squares that it was shown.
        metrics: figures of its validation; empty for imported heads.
        training: settings.
    """

    backbone: str
    sha256: str
    width: int
    side: int
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def made_for(backbone: Backbone, metrics: Mapping[str, float], training: Mapping[str, Any]) -> Made:
    """What to say of a head for this backbone. Of its name, a path keeps its last part."""
    name = Path(backbone.name).resolve().name if Path(backbone.name).is_dir() else backbone.name
    return Made(name, backbone.digest, backbone.width, backbone.side, dict(metrics), dict(training))


def save_head(path: Path, head: Head, made: Made) -> None:
    """Write a head, completely or not at all.

    Raises:
        WeightsError: the file cannot be written.
    """
    values = asdict(made)
    about = {
        "head": asdict(Shape(head.dims, head.activation, head.layernorm)),
        "metrics": values.pop("metrics"),
        "training": values.pop("training"),
        "backbone": values,
        "input": {"resize": "bilinear, antialias, no crop", "range": "0..1", "mean": MEAN, "std": STD},
    }
    texts = {key: json_text(value) for key, value in about.items()}
    save_weights(path, head.state_dict(), {"format": FORMAT, **texts})


def load_head(path: Path, backbone: Backbone | None = None) -> tuple[Head, Made]:
    """Read a head, in eval mode, on the CPU.

    Args:
        backbone: what it is going to be used on.

    Raises:
        UserError: the file is not a head, or was made for another backbone.
        WeightsError: the file cannot be read.
    """
    weights = Weights(path)
    if weights.metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: not an identity head; make one by `python -m training vfl-head`, or vfl-import-head from a .pt"
        )
    try:
        shape = build(Shape, parse_object(weights.metadata["head"]))
        texts = {key: parse_object(weights.metadata[key]) for key in ("backbone", "metrics", "training")}
        made = build(Made, texts.pop("backbone") | texts)
        check_count(weights.shapes)
        head = head_of({key: weights[key] for key in weights.shapes}, shape.activation)
        if (found := Shape(head.dims, head.activation, head.layernorm)) != shape or head.dims[0] != made.width:
            raise ValueError(f"{found.dims} in the weights, {shape.dims} in the metadata")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: a damaged identity head ({error}); make it again") from None
    if backbone is not None:
        check_width(str(path), head.dims[0], backbone)
        if made.sha256 != backbone.digest or made.side != backbone.side:
            raise UserError(
                f"{path}: made for {made.backbone} (sha256 {made.sha256[:12]}…); {backbone.name} has other weights "
                f"({backbone.digest[:12]}…); use the one that it was made for"
            )
    return head, made


def head_of(weights: Mapping[str, Tensor], activation: str) -> Head:
    """A head from the weights of its layers, in eval mode, in float32.

    The layers are found by their order and their shapes: matrices are Linear, and vectors alone are LayerNorm. So
    their numbers may differ, as they do with and without dropout.

    Args:
        weights: by `….<i>.weight` and `….<i>.bias`.

    Raises:
        ValueError: these are not the layers of a head.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; expected {', '.join(ACTIVATIONS)}")
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        number, kind = key.split(".")[-2:] if key.count(".") else ("", "")
        if not (number.isdecimal() and len(number) < 6 and kind in ("weight", "bias")):
            raise ValueError(f"{key[:60]}; expected keys like net.0.weight")
        if not tensor.dtype.is_floating_point or tensor.layout != torch.strided:
            raise ValueError(f"{key} is {tensor.dtype}; expected floats")
        layers.setdefault(int(number), {})[kind] = tensor.detach()
    ordered = [layers[number] for number in sorted(layers)]
    matrices = [layer["weight"] for layer in ordered if "weight" in layer and layer["weight"].ndim == 2]
    if not matrices:
        raise ValueError("no matrix in it; expected the layers of a head")
    dims = (matrices[0].shape[1], *(matrix.shape[0] for matrix in matrices))
    if dims[1:-1] != tuple(matrix.shape[1] for matrix in matrices[1:]) or 0 in dims:  # or their product might be huge
        raise ValueError(f"matrices of {', '.join(str(tuple(matrix.shape)) for matrix in matrices[:9])} in a row")
    head = Head(dims, activation, layernorm=len(ordered) > len(matrices))
    places = [layer for layer in head.net if list(layer.parameters())]
    if [_shapes(dict(place.named_parameters())) for place in places] != [_shapes(layer) for layer in ordered]:
        found = "; ".join(str(_shapes(layer).get("weight")) for layer in ordered)
        raise ValueError(f"layers of {found}; expected Linear, LayerNorm, Linear …, or Linear alone, with biases")
    for place, layer in zip(places, ordered, strict=True):
        place.load_state_dict(layer)
    if not all(parameter.isfinite().all() for parameter in head.parameters()):
        raise ValueError("numbers that are not finite")
    return head.eval()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def check_count(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse more values than any head has, before they are allocated.

    Raises:
        ValueError: there are more.
    """
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    if count > MOST_VALUES:
        raise ValueError(f"{count:,} values; expected {MOST_VALUES:,} at most")


def check_width(name: str, width: int, backbone: Backbone) -> None:
    """Refuse a backbone whose features a head does not take.

    Raises:
        UserError: names both.
    """
    if width != backbone.width:
        kind = f", as of DINOv3 {KINDS[width]}" if width in KINDS else ""
        raise UserError(
            f"{name}: a head for {width} features{kind}; {backbone.name} gives {backbone.width}; "
            "choose another --backbone"
        )
