"""VAEs of HunyuanVideo and HunyuanVideo 1.5, read from a weights file into the modules of diffusers."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kvae import WeightsError
from ..kvae.engine.convolution import Conv3d
from ..kvae.files import Weights, what_is
from ..kvae.finite import all_finite
from ..kvae.foreign import parse_object
from ..kvae.paths import read_text

NEWER = "a HunyuanVideo 1.5 VAE"  # see kvae.files.what_is
# Tencent's names in the config of 1.5; of its other entries, diffusers' class has those that matter
RATIOS = {"ffactor_spatial": "spatial_compression_ratio", "ffactor_temporal": "temporal_compression_ratio"}


def read_hunyuan_vae(path: Path, dtype: torch.dtype) -> Any:
    """Read AutoencoderKLHunyuanVideo or AutoencoderKLHunyuanVideo15, frozen, on the CPU.

    The keys are diffusers', Tencent's or ComfyUI's.

    Raises:
        WeightsError: the file holds something else; the message says what.
    """
    weights = Weights(path)
    kind = what_is(weights.shapes)
    if not kind.startswith("a HunyuanVideo"):
        raise WeightsError(f"{path}: this is {kind}; expected a HunyuanVideo VAE (--hunyuan-vae)")
    newer = kind == NEWER
    vae = _empty_model(path, weights, newer)
    state = _diffusers_state(weights, newer)
    _check_tensors(path, state, vae.state_dict())
    vae.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
    return vae.eval().requires_grad_(False)


def _empty_model(path: Path, weights: Weights, newer: bool) -> Any:
    """Build the model that the file's config describes, on the meta device."""
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15

    kind: Any = AutoencoderKLHunyuanVideo15 if newer else AutoencoderKLHunyuanVideo
    config = {RATIOS.get(key, key): value for key, value in _config(path, weights).items()}
    try:
        with torch.device("meta"):
            vae = kind(**{key: config[key] for key in signature(kind).parameters if key in config})
            replace_convolutions(vae)
    except Exception as error:  # diffusers checks little, so a config can fail anywhere within it
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: its config is not that of a HunyuanVideo VAE ({line})") from None
    return vae


def replace_convolutions(vae: nn.Module) -> None:
    """Use this project's convolutions: they need half the time on a CPU and give the same results."""
    for parent in list(vae.modules()):
        for name, conv in parent.named_children():
            if type(conv) is nn.Conv3d and conv.padding == (0, 0, 0):
                ours = Conv3d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)  # type: ignore[arg-type]
                setattr(parent, name, ours)


def _diffusers_state(weights: Weights, newer: bool) -> dict[str, Tensor]:
    """All tensors of a file under diffusers' keys."""
    state = {key: weights[key] for key in weights.shapes}
    if "decoder.mid.attn_1.q.weight" not in state:
        return state
    state = {diffusers_key(key, newer): tensor for key, tensor in state.items()}
    if newer:
        return state
    # ComfyUI's attention is made of 1x1x1 convolutions, diffusers' of matrices
    return {key: v.flatten(1) if ".to_" in key and v.ndim == 5 else v for key, v in state.items()}


def _check_tensors(path: Path, state: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    """Raise WeightsError unless the tensors have the model's keys and shapes and hold finite numbers."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise WeightsError(f"{path}: {len(wrong)} tensors are not those of a HunyuanVideo VAE, first {wrong[0]}")
    for key, tensor in state.items():
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise WeightsError(f"{path}: {key} holds values that are not finite numbers; download it or make it again")


def diffusers_key(key: str, newer: bool = False) -> str:
    """A key of ComfyUI's file → diffusers' key. Tencent's keys are diffusers' for HunyuanVideo, ComfyUI's for 1.5.

    For HunyuanVideo, the two count the decoder's levels from opposite ends.
    """

    def up(level: str) -> str:
        return level if newer else str(3 - int(level))

    key = re.sub(r"down\.(\d)\.block\.(\d)", r"down_blocks.\1.resnets.\2", key)
    key = re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0", key)
    key = re.sub(r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{up(m[1])}.resnets.{m[2]}", key)
    key = re.sub(r"up\.(\d)\.upsample", lambda m: f"up_blocks.{up(m[1])}.upsamplers.0", key)
    key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
    key = re.sub(r"mid\.attn_1\.([qkv])\b", r"mid_block.attentions.0.to_\1", key)
    names = {"mid.attn_1.": "mid_block.attentions.0.", "nin_shortcut": "conv_shortcut"}
    if not newer:
        names |= {
            "attentions.0.norm": "attentions.0.group_norm",
            "attentions.0.proj_out": "attentions.0.to_out.0",
            "coder.norm_out": "coder.conv_norm_out",
        }
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


def _config(path: Path, weights: Weights) -> dict:
    """The config in the file's metadata, or in config.json next to the file; empty for the published one.

    Raises:
        WeightsError: the config is not that of a HunyuanVideo VAE.
    """
    config_file = path.parent / "config.json"
    try:
        if "config" in weights.metadata:
            config = parse_object(weights.metadata["config"])
        else:
            config = parse_object(read_text(config_file)) if config_file.is_file() else {}
        _check_bounds(config, weights)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: its config is not that of a HunyuanVideo VAE ({error})") from None
    return config


def _check_bounds(config: dict, weights: Weights) -> None:
    """Refuse a config with more layers or channels than the file has; building such a model might never end.

    Raises:
        ValueError: a number is too large.
    """
    most = max([len(weights.shapes), *(size for shape in weights.shapes.values() for size in shape)])
    for key in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "block_out_channels"):
        value = config.get(key, 1)
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > most or not all(type(each) is int and 0 < each <= most for each in numbers):
            raise ValueError(f"{key} is {str(value)[:60]}, which does not fit the tensors of this file")
