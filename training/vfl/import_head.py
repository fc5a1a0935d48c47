"""Turn a published identity head, a .pt file, into a safetensors file, once. No code in it is run.

    python -m training vfl-import-head --input published.pt --backbone dinov3-vitb16 --output head.safetensors

The file holds `head_state_dict` and `config`, as the trainer of Video-Free-LoRA-Hyvideo1.5-I2V writes them, or the
weights alone. The layers are found by their shapes. The backbone must be the DINOv3 that the head was trained on: the
file itself does not say which.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kvae.paths import check_regular, file_errors
from ..errors import UserError
from ..options import option
from ..runtime.places import check_apart
from .backbone import load_backbone
from .head_files import check_count, check_width, head_of, made_for, save_head
from .identity import Head

MOST_BYTES = 1 << 30  # of the file, and of what is in it; with its optimiser, the head of DINOv3 7B has 27 MB


@dataclass
class VflImportHeadConfig:
    input: str = option(..., "the published head, a .pt file")
    backbone: str = option(..., "the DINOv3 ViT that it was trained on: folder or hub id", metavar="MODEL")
    output: str = option("head.safetensors", "file to write", writes="file")


def run(config: VflImportHeadConfig) -> int:
    """Import a head; return 0.

    Raises:
        UserError: the input is not such a file, or not for this backbone.
        WeightsError: a file cannot be read or written.
    """
    source, target = Path(config.input), Path(config.output)
    if target.suffix != ".safetensors":
        raise UserError(f"--output is {target}; expected a name that ends in .safetensors")
    check_apart({"--output": target}, [source])
    head = published_head(source)
    backbone = load_backbone(config.backbone, "cpu")
    check_width(str(source), head.dims[0], backbone)
    save_head(target, head, made_for(backbone, {}, {"imported": source.name}))
    widths = " → ".join(str(width) for width in head.dims)
    print(f"{target}: {widths}, {head.activation}, {'with' if head.layernorm else 'no'} LayerNorm")
    return 0


def published_head(path: Path) -> Head:
    """Read a published head, in eval mode.

    Raises:
        UserError: this is no such file.
        WeightsError: it cannot be read.
    """
    check_size(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can fail in any way
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not weights alone, so it was not opened ({line[:200]}); expected a head") from None
    try:
        weights, settings = _parts(content)
        return head_of(weights, str(settings.get("activation", "gelu")).lower())
    except ValueError as error:
        raise UserError(f"{path}: not a published identity head ({error})") from None


def check_size(path: Path) -> None:
    """Refuse a file that would fill the memory.

    Raises:
        UserError: it is larger than any head, compressed, or not the zip file that torch.save writes.
        WeightsError: it cannot be read.
    """
    check_regular(path)
    with file_errors(path):
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: {size:,} bytes; expected a head, of {MOST_BYTES:,} at most")
        try:
            with zipfile.ZipFile(path) as file:
                parts = file.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: not a file that torch.save writes ({error}); download it again") from None
    if sum(part.file_size for part in parts) > size:
        raise UserError(f"{path}: its parts are compressed, as torch.save never does; expected a head")


def _parts(content: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Weights and settings.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}; expected head_state_dict and config")
    weights, settings = content.get("head_state_dict", content), content.get("config")
    if not isinstance(weights, dict) or not weights:
        raise ValueError("no weights in it")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{str(key)[:60]} is a {type(value).__name__}; expected weights alone")
        if value.layout == torch.strided and value.numel() > value.untyped_storage().nbytes():
            raise ValueError(f"{key[:60]} has {value.numel():,} values, of which few are in the file")
    check_count({key: tuple(value.shape) for key, value in weights.items()})
    return weights, settings if isinstance(settings, dict) else {}
