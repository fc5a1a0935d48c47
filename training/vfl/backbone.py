"""Read DINOv3 ViT, as transformers writes it: a folder with config.json and safetensors, or a hub id."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ...kvae.errors import WeightsError
from ...kvae.foreign import parse_object
from ...kvae.hub import hub_client, hub_reason, may_be_hub_id
from ...kvae.paths import file_errors, read_text, sha256_of
from ..errors import UserError
from .identity import Backbone
from .quiet import quiet


def load_backbone(name: str, device: torch.device | str) -> Backbone:
    """Read DINOv3: in bfloat16 on a GPU, and in float32 elsewhere, where bfloat16 is slow.

    Args:
        name: a folder, or a hub id, which is downloaded.

    Raises:
        UserError: transformers is not installed, or this is not a DINOv3 ViT.
        WeightsError: it cannot be read or downloaded.
    """
    try:
        from transformers import DINOv3ViTModel
    except ImportError:
        raise UserError("transformers 4.57 or newer is not installed: pip install -r requirements-vfl.txt") from None
    folder = _folder_of(name)
    backbone_config(name)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    try:
        with quiet():
            loaded: Any = DINOv3ViTModel.from_pretrained(folder, output_loading_info=True, **options)
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):  # transformers would leave them random
            raise ValueError(f"no {missing[0]} in its weights")
        side = model.config.image_size
        if not isinstance(side, int) or side % model.config.patch_size:
            raise ValueError(f"image_size {side}; expected a multiple of {model.config.patch_size}")
    except Exception as error:  # transformers checks little, so a folder can fail anywhere within it
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--backbone {name}: not a DINOv3 ViT that can be read ({line})") from None
    return Backbone(model, name, _digest(folder)).to(device)


def backbone_config(name: str) -> dict[str, Any]:
    """The config of a DINOv3 ViT.

    Raises:
        UserError, WeightsError: as `load_backbone`.
    """
    config = _config(_folder_of(name))
    if (kind := config.get("model_type")) != "dinov3_vit":
        raise UserError(f"--backbone {name}: a model of type {kind!r}; expected dinov3_vit (DINOv3, but not ConvNeXt)")
    return config


def _folder_of(name: str) -> Path:
    path = Path(name)
    with file_errors(path):
        if path.is_dir():
            return path
    if not may_be_hub_id(name):
        raise UserError(f"--backbone {name}: no such folder; expected a folder of DINOv3, or a hub id (owner/name)")
    try:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(hub_client().snapshot_download(name, allow_patterns=patterns))
    except WeightsError as error:
        raise WeightsError(f"--backbone {name}: no such folder, and {error}") from None
    except Exception as error:  # which HTTP library raises it depends on huggingface_hub's version
        raise WeightsError(f"--backbone {name}: no such folder, and the hub says: {hub_reason(error)}") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    text = read_text(path)
    try:
        return parse_object(text)
    except ValueError as error:
        raise UserError(f"{path}: not a config of transformers ({error}); download the folder again") from None


def _digest(folder: Path) -> str:
    """The hash of the weights: of the one file, or of the hashes of several."""
    one = folder / "model.safetensors"
    if one.is_file():
        return sha256_of(one)
    hashes = [sha256_of(path) for path in sorted(folder.glob("model-*.safetensors"))]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
