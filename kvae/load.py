"""Load KVAE-3D weights strictly, from a file, a folder or a hub id, with official or diffusers keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .config import FAMILY, KVAEConfig
from .errors import WeightsError
from .files import Weights, save_weights, what_is
from .find import find_weights
from .finite import all_finite
from .foreign import build, parse_object
from .hub import WEIGHTS_FILES
from .model import KVAE
from .paths import read_text
from .spellings import MOST_CONFIG_BYTES, fields_of

_EXPECTED = f"a KVAE-3D VAE ({', '.join(FAMILY)})"
CONFIG = "kvae_config"  # tensor with the config's JSON as bytes, for writers that keep only tensors
MOST_KEYS, MOST_LEVELS = 2000, 8  # the published models have up to 378 and 5

Shapes = Mapping[str, tuple[int, ...]]


def load_kvae(name: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> KVAE:
    """Load a KVAE in eval mode, frozen and folded. Each tensor is read straight to `dtype` and `device`.

    Args:
        name: a .safetensors file; a folder with model.safetensors or diffusion_pytorch_model.safetensors, and
            config.json, or a pipeline's folder, which has them in vae/; the name of a published model (KVAE-3D-1.0); or
            a hub id (owner/name). The last two are downloaded with huggingface_hub. The config of a file comes from its
            metadata, its tensor `kvae_config` or config.json, in any spelling (`spellings`), otherwise from the shapes.

    Raises:
        WeightsError: the file is missing, damaged, or not a KVAE-3D; the message says what it is.
    """
    path = find_weights(name)
    weights = Weights(path)
    names, config = _described(path, weights)
    shapes = {key: weights.shapes[found] for key, found in names.items()}
    with torch.device("meta"):
        kvae = KVAE(config)
    _check_shapes(path, {key: tuple(p.shape) for key, p in kvae.state_dict().items()}, shapes)
    for key, found in names.items():
        module, leaf = kvae.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        tensor = _sound(path, found, weights[found]).to(device=device, dtype=dtype)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return kvae.eval().fold()


def read_config(path: str | os.PathLike) -> KVAEConfig:
    """The config of a KVAE file. Only its header is read, and config.json beside it.

    Raises:
        WeightsError: the file is missing, damaged, or not a KVAE-3D; the message says what it is.
    """
    return _described(Path(path), Weights(path))[1]


def save_kvae(path: str | os.PathLike, kvae: KVAE, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write one self-describing file: official keys, the config as JSON in the metadata, and the given metadata.

    Raises:
        WeightsError: the file cannot be written.
    """
    tensors = {key: tensor.to(dtype) for key, tensor in kvae.state_dict().items()}
    save_weights(path, tensors, {"config": json.dumps(kvae.config.to_dict()), **metadata})


def described_state(kvae: KVAE) -> dict[str, Tensor]:
    """The state dict with the config as a tensor, for writers that drop our metadata. `load_kvae` reads it.

    Weights that lie in memory as their device wants them are copied: writers refuse those.
    """
    text = json.dumps(kvae.config.to_dict()).encode()
    weights = {key: weight.contiguous() for key, weight in kvae.state_dict().items()}
    return {**weights, CONFIG: torch.tensor(list(text), dtype=torch.uint8)}


def official_key(key: str) -> str:
    """The official key for one of the official or diffusers layout; diffusers wraps each GroupNorm once more."""
    if ".norm_layer.norm_layer." in key:
        return key.replace(".norm_layer.norm_layer.", ".norm_layer.")
    return re.sub(r"^(encoder\..*norm(?:1|2|_out))\.norm_layer\.", r"\1.", key)


def config_from_shapes(shapes: Shapes) -> KVAEConfig:
    """Infer the config of a file that has none.

    The shapes do not show the groups of a GroupNorm and the padding. These are assumed to be those of the published
    models: 32 groups, and zeros as padding if time compression starts at the second level.

    Raises:
        ValueError: these are not the shapes of a KVAE-3D.
    """
    fields = _fields_from_shapes(shapes)
    return KVAEConfig(**fields, padding="zeros" if fields["temporal_start_level"] else "replicate")


def _fields_from_shapes(shapes: Shapes) -> dict:
    """The fields of a config that follow from the shapes: all but `norm_groups` and `padding`.

    A model with these fields is no larger than its file.

    Raises:
        ValueError: these are not the shapes of a KVAE-3D.
    """

    def side(key: str, dim: int) -> int:
        if len(shapes.get(key, ())) <= dim or not shapes[key][dim]:
            raise ValueError(f"{key} is missing or empty")
        return shapes[key][dim]

    found = {m[1] for key in shapes if (m := re.match(r"encoder\.down\.([^.]+)\.", key))}
    levels = len(found)
    if found != {str(i) for i in range(levels)} or levels > MOST_LEVELS:
        raise ValueError(f"{levels} levels called {', '.join(sorted(found)[:9])}; expected 0, 1, 2 …")
    blocks = sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.conv\.bias", key)) for key in shapes)
    if len(shapes) > MOST_KEYS or levels * blocks > len(shapes):
        raise ValueError(f"{len(shapes)} tensors, {blocks} blocks in a level; a KVAE-3D has a few hundred and 2")
    timed = [i for i in range(levels) if any(k.startswith(f"encoder.down.{i}.downsample.temporal") for k in shapes)]
    encoder = tuple(side(f"encoder.down.{i}.block.0.conv1.conv.weight", 0) for i in range(levels))
    doubled = levels > 1 and side("encoder.down.0.downsample.linear.weight", 0) == 2 * encoder[0]
    return {
        "encoder_widths": encoder,
        "decoder_widths": tuple(side(f"decoder.up.{i}.block.0.conv1.conv.weight", 0) for i in range(levels)),
        "num_res_blocks": blocks,
        "z_channels": side("decoder.conv_in.conv.weight", 1),
        "temporal_compress_times": 2 ** len(timed),
        "temporal_start_level": min(timed, default=0),
        "norm": "rms" if "encoder.norm_out.gamma" in shapes else "group",
        "downsample_version": 2 if doubled else 1,
    }


def _described(path: Path, weights: Weights) -> tuple[dict[str, str], KVAEConfig]:
    """The file's keys, by their official names, and the config.

    Raises:
        WeightsError: not a KVAE-3D, or its config is damaged or does not match the tensors.
    """
    names = {official_key(key): key for key in weights.shapes if key != CONFIG}
    kind = what_is(names)
    if not kind.startswith("a KVAE-3D"):
        raise WeightsError(f"{path}: this is {kind}; expected {_EXPECTED}")
    if len(names) < len(weights.shapes) - (CONFIG in weights.shapes):
        raise WeightsError(f"{path}: holds the same tensors twice, with official and with diffusers keys")
    return names, _config(path, weights, {key: weights.shapes[found] for key, found in names.items()})


def _config(path: Path, weights: Weights, shapes: Shapes) -> KVAEConfig:
    """The config from the file or its folder, otherwise from the shapes. It agrees with the shapes.

    Raises:
        WeightsError: the config is damaged or does not match the tensors.
    """
    try:
        inferred = _fields_from_shapes(shapes)
        text = weights.metadata.get("config") or _config_tensor(weights) or _config_beside(path)
        if not text:
            return config_from_shapes(shapes)
        said = fields_of(parse_object(text))
        _check_agreement(path, KVAEConfig().to_dict() | said, inferred)
        return build(KVAEConfig, said)
    except WeightsError:
        raise
    except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: its config is not that of {_EXPECTED} ({error})") from None


def _check_agreement(path: Path, said: dict, inferred: dict) -> None:
    """Refuse a config that says something else than the shapes."""
    for name, value in inferred.items():
        found = tuple(said[name]) if isinstance(said[name], list) else said[name]
        if found != value:
            raise WeightsError(f"{path}: its config says {name} is {found!s:.60}, its tensors say {value}")


def _config_tensor(weights: Weights) -> str | None:
    if CONFIG not in weights.shapes:
        return None
    shape = weights.shapes[CONFIG]
    if len(shape) != 1 or shape[0] > MOST_CONFIG_BYTES or weights[CONFIG].dtype != torch.uint8:
        raise ValueError(f"{CONFIG} is not text")
    return bytes(weights[CONFIG].tolist()).decode()


def _config_beside(path: Path) -> str | None:
    """The text of config.json next to the file, if the file's name says that the folder is of one model."""
    beside = path.parent / "config.json"
    return read_text(beside) if path.name in WEIGHTS_FILES and beside.is_file() else None


def _sound(path: Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor, checked.

    Raises:
        WeightsError: it is not a float tensor, or not all values are finite.
    """
    if not tensor.is_floating_point():
        raise WeightsError(f"{path}: {key} is {tensor.dtype}; expected a float type")
    if not all_finite(tensor):
        raise WeightsError(f"{path}: {key} holds values that are not finite numbers; download or make it again")
    return tensor


def _check_shapes(path: Path, expected: dict[str, tuple], found: Shapes) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    if missing or extra:
        raise WeightsError(
            f"{path}: {len(missing)} keys missing {missing[:2]}, {len(extra)} unknown {extra[:2]}; "
            f"expected the {len(expected)} keys of this kind of KVAE-3D"
        )
    if wrong:
        key = min(wrong)
        raise WeightsError(f"{path}: {key} is {list(found[key])}; expected {list(expected[key])}")
