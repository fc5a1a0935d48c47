"""Load KVAE-3D weights: one file, a folder or a hub id, official or diffusers keys, strictly."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from .config import FAMILY, KVAEConfig
from .files import Weights, WeightsError, save_weights, what_is
from .find import FILE_NAMES, find_weights
from .model import KVAE

_EXPECTED = f"a KVAE-3D VAE ({', '.join(FAMILY)})"


def load_kvae(name: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> KVAE:
    """A KVAE in eval mode, frozen and folded, every tensor read straight to `dtype` and `device`.

    Args:
        name: a .safetensors file (its config in the metadata, else read off the shapes); a folder with
            model.safetensors or diffusion_pytorch_model.safetensors, and config.json; or a hub id (owner/name), which
            is downloaded with huggingface_hub.

    Raises:
        WeightsError: the file is missing, damaged, or not a KVAE-3D; the message says what it is.
    """
    path = find_weights(name)
    weights = Weights(path)
    names = {official_key(key): key for key in weights.shapes}
    kind = what_is(names)
    if not kind.startswith("a KVAE-3D"):
        raise WeightsError(f"{path}: this is {kind}; expected {_EXPECTED}")
    shapes = {key: weights.shapes[found] for key, found in names.items()}
    try:
        beside = path.parent / "config.json"
        foreign = path.name not in FILE_NAMES or not beside.is_file()  # a file in a folder of many has no config there
        text = weights.metadata.get("config") or (None if foreign else beside.read_text(encoding="utf-8"))
        config = KVAEConfig.from_dict(json.loads(text)) if text else config_from_shapes(shapes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: its config is not that of {_EXPECTED} ({error})") from None
    with torch.device("meta"):
        kvae = KVAE(config)
    _check_shapes(path, {key: tuple(p.shape) for key, p in kvae.state_dict().items()}, shapes)
    for key, found in names.items():
        module, leaf = kvae.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        tensor = weights[found].to(device=device, dtype=dtype)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return kvae.eval().fold()


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
    """The config of a file that carries none. What leaves no trace in the shapes is that of the published models:
    32 groups in a GroupNorm, and the padding, which is of zeros where compression starts at the second level."""
    levels = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down."))
    timed = [i for i in range(levels) if any(k.startswith(f"encoder.down.{i}.downsample.temporal") for k in shapes)]
    rms = "encoder.norm_out.gamma" in shapes
    config = KVAEConfig(
        encoder_widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.conv.weight"][0] for i in range(levels)),
        decoder_widths=tuple(shapes[f"decoder.up.{i}.block.0.conv1.conv.weight"][0] for i in range(levels)),
        num_res_blocks=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.conv\.bias", k)) for k in shapes),
        z_channels=shapes["decoder.conv_in.conv.weight"][1],
        temporal_compress_times=2 ** len(timed),
        temporal_start_level=min(timed, default=0),
        norm="rms" if rms else "group",
        downsample_version=2 if rms else 1,
    )
    return replace(config, padding="zeros") if config.temporal_start_level else config


def _check_shapes(path: Path, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    if missing or extra:
        raise WeightsError(
            f"{path}: {len(missing)} keys missing {missing[:2]}, {len(extra)} unknown {extra[:2]}; "
            f"expected the {len(expected)} keys of its kind of KVAE-3D"
        )
    if wrong:
        key = min(wrong)
        raise WeightsError(f"{path}: {key} is {list(found[key])}; expected {list(expected[key])}")
