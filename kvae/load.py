"""Load KVAE-3D weights: one file or a folder, official or diffusers keys, strictly."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from .config import KVAEConfig
from .files import Weights, WeightsError, save_weights, what_is
from .model import KVAE

_FILE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def load_kvae(path: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> KVAE:
    """A KVAE in eval mode, every tensor read straight to `dtype` and `device`.

    Args:
        path: a .safetensors file (its config in the metadata, else read off the shapes), or a folder with
            config.json and model.safetensors or diffusion_pytorch_model.safetensors.

    Raises:
        WeightsError: the file is missing, damaged, or not a KVAE-3D-1.0; the message says what it is.
    """
    path = Path(path)
    config_json = None
    if path.is_dir():
        folder, present = path, [name for name in _FILE_NAMES if (path / name).is_file()]
        if not present:
            raise WeightsError(f"{folder}: holds neither {_FILE_NAMES[0]} nor {_FILE_NAMES[1]}; expected a KVAE folder")
        path = folder / present[0]
        if (folder / "config.json").is_file():
            config_json = (folder / "config.json").read_text(encoding="utf-8")
    weights = Weights(path)
    names = {official_key(key): key for key in weights.shapes}
    kind = what_is(names)
    if kind != "a KVAE-3D":
        raise WeightsError(f"{path}: this is {kind}; expected a KVAE-3D-1.0 VAE")
    config_json = config_json or weights.metadata.get("config")
    try:
        shapes = {key: weights.shapes[name] for key, name in names.items()}
        config = KVAEConfig.from_dict(json.loads(config_json)) if config_json else config_from_shapes(shapes)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: its config is not that of a KVAE-3D-1.0 ({error})") from None
    with torch.device("meta"):
        kvae = KVAE(config)
    _check_shapes(path, {key: tuple(p.shape) for key, p in kvae.state_dict().items()}, shapes)
    for key, name in names.items():
        module, leaf = kvae.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        tensor = weights[name].to(device=device, dtype=dtype)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return kvae.eval()


def save_kvae(path: str | os.PathLike, kvae: KVAE, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write one self-describing file: official keys, the config as JSON in the metadata beside what is given."""
    tensors = {key: tensor.to(dtype) for key, tensor in kvae.state_dict().items()}
    save_weights(path, tensors, {"config": json.dumps(kvae.config.to_dict()), **metadata})


def official_key(key: str) -> str:
    """A key of the official or the diffusers layout → the official one (diffusers wraps each GroupNorm once more)."""
    if ".norm_layer.norm_layer." in key:
        return key.replace(".norm_layer.norm_layer.", ".norm_layer.")
    return re.sub(r"^(encoder\..*norm(?:1|2|_out))\.norm_layer\.", r"\1.", key)


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> KVAEConfig:
    """The config of a file that carries none. `norm_groups` leaves no trace in the shapes: 32, as published."""
    levels = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down."))
    ch = shapes["encoder.conv_in.conv.weight"][0]
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.conv.weight"][0] for i in range(levels)]
    times = sum(f"encoder.down.{i}.downsample.temporal_conv.conv.weight" in shapes for i in range(levels))
    return KVAEConfig(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.conv\.bias", k)) for k in shapes),
        z_channels=shapes["decoder.conv_in.conv.weight"][1],
        temporal_compress_times=2**times,
    )


def _check_shapes(path: Path, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    if missing or extra:
        raise WeightsError(
            f"{path}: {len(missing)} keys missing {missing[:2]}, {len(extra)} unknown {extra[:2]}; "
            f"expected the {len(expected)} keys of a KVAE-3D-1.0"
        )
    if wrong:
        key = min(wrong)
        raise WeightsError(f"{path}: {key} is {list(found[key])}; expected {list(expected[key])}")
