"""Malformed or damaged adapters and VAEs are refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import needs
from bad_rows import (
    EVALUATE,
    MY_ADAPTER,
    NESTED,
    NO_OBJECTS,
    RECONSTRUCT,
    Plant,
    Row,
    adapter,
    check,
    make_job,
    weights_like,
)
from kvae_comfyui.training.vaes import TINY

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)


def network(**settings: object) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        metadata["network"] = json.dumps(json.loads(metadata["network"]) | settings)

    return weights_like(None, "h2k.safetensors", change)


def retyped(path: Path | None, name: str, dtype: torch.dtype) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items()}

    return weights_like(path, name, change)


def refilled(path: Path | None, name: str) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        tensors |= {key: torch.full_like(tensor, math.nan) for key, tensor in tensors.items()}

    return weights_like(path, name, change)


ADAPTER_FILES = [
    *(Row(MY_ADAPTER, "h2k.safetensors", adapter(network=text))
      for text in (NESTED, "{", "null", "[]", "3", '"residual"', "{}", '{"name": null}', '{"name": "other"}')),
    *(Row(MY_ADAPTER, "h2k.safetensors", network(**settings)) for settings in (
        *({"width": 1_000_000}, {"width": 10**30}, {"width": -1}, {"width": 0}, {"width": "64"}, {"width": None}),
        *({"blocks": 10**9}, {"blocks": -1}, {"blocks": 1.5}, {"future": 3}, {"in_channels": 10**9}),
    )),
    *(Row(MY_ADAPTER, "h2k.safetensors", adapter(source_space=name)) for name in ("sdxl", "", NESTED, "kvae_3d_1.0")),
    *(Row(MY_ADAPTER, "h2k.safetensors", adapter(format=name)) for name in ("kvae-latent-adapter/9", "other", "")),
    *(Row(MY_ADAPTER, "", adapter(training=value), code=(0, 2)) for value in (NESTED, "[]", "3", '{"extraction": 3}')),
    *(Row(MY_ADAPTER, "", adapter(metrics=value), code=(0, 2)) for value in (NESTED, '"text"', '{"val_mse": NaN}')),
    *(Row(MY_ADAPTER, "h2k.safetensors", retyped(None, "h2k.safetensors", dtype))
      for dtype in (torch.int8, torch.complex64, torch.bool)),
    Row(MY_ADAPTER, "h2k.safetensors", refilled(None, "h2k.safetensors")),
    *(Row(MY_ADAPTER, "h2k.safetensors", weights_like(None, "h2k.safetensors", lambda t, m: None, header))
      for header in (b"{", b"{}", NESTED.encode(), b"null")),
]  # fmt: skip


def kvae_config(**settings: object) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | settings)

    return weights_like(TINY["kvae"], "kvae.safetensors", change)


def config_text(path: Path, name: str, text: str) -> Plant:
    return weights_like(path, name, lambda tensors, metadata: metadata.update(config=text))


def kvae_without_config(**keys: torch.Tensor) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        del metadata["config"]
        tensors |= {key.replace("__", "."): tensor for key, tensor in keys.items()}

    return weights_like(TINY["kvae"], "kvae.safetensors", change)


def hunyuan_config(**settings: object) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | settings)

    return weights_like(TINY["hunyuan"], "hunyuan.safetensors", change)


MY_KVAE = RECONSTRUCT + " --kvae {d}/kvae.safetensors"
MY_HUNYUAN = RECONSTRUCT + " --vae hunyuan --hunyuan-vae {d}/hunyuan.safetensors"
VAES = [
    *(Row(MY_KVAE, "kvae.safetensors", config_text(TINY["kvae"], "kvae.safetensors", text)) for text in NO_OBJECTS),
    *(Row(MY_KVAE, "kvae.safetensors", kvae_config(**settings)) for settings in (
        *({"num_res_blocks": 10**9}, {"num_res_blocks": -1}, {"num_res_blocks": "1"}, {"z_channels": 10**30}),
        *({"encoder_widths": [2**40] * 4}, {"encoder_widths": [16] * 1000, "decoder_widths": [16] * 1000}),
        *({"norm_groups": 0}, {"norm_groups": -8}, {"temporal_start_level": -3}, {"temporal_start_level": 10**9}),
        *({"encoder_widths": None}, {"z_channels": 1.5}, {"norm": []}),
    )),
    *(Row(MY_KVAE, "kvae.safetensors", kvae_without_config(**{key: torch.zeros(1)})) for key in (
        *("encoder__down__99999999__block__0__conv1__conv__weight", "encoder__down__x__y", "encoder__down__"),
        *("encoder__down__-1__block__0__conv1__conv__weight", f"encoder__down__{'9' * 5000}__x"),
    )),
    *(Row(MY_KVAE, "kvae.safetensors", retyped(TINY["kvae"], "kvae.safetensors", dtype))
      for dtype in (torch.int8, torch.complex64)),
    Row(MY_KVAE, "kvae.safetensors", refilled(TINY["kvae"], "kvae.safetensors")),
    *(Row(MY_HUNYUAN, "config", config_text(TINY["hunyuan"], "hunyuan.safetensors", text)) for text in NO_OBJECTS),
    *(Row(MY_HUNYUAN, "config", hunyuan_config(**settings)) for settings in (
        *({"layers_per_block": 10**9}, {"layers_per_block": 0}, {"layers_per_block": "1"}, {"layers_per_block": None}),
        *({"block_out_channels": [2**40] * 4}, {"block_out_channels": [16] * 100_000}, {"block_out_channels": []}),
        *({"block_out_channels": "abcd"}, {"latent_channels": -16}, {"norm_num_groups": 0}, {"norm_num_groups": 7}),
        *({"down_block_types": ["None"] * 4}, {"act_fn": "none"}, {"act_fn": []}),
    )),
    *(Row(MY_HUNYUAN, "hunyuan.safetensors", retyped(TINY["hunyuan"], "hunyuan.safetensors", dtype))
      for dtype in (torch.int8, torch.complex64)),
    Row(MY_HUNYUAN, "hunyuan.safetensors", refilled(TINY["hunyuan"], "hunyuan.safetensors")),
    Row(MY_KVAE + " --kvae {h2k}", "this is a latent adapter; expected a KVAE-3D"),
    Row(EVALUATE + f" --adapter-h2k {TINY['kvae']}", "this is a KVAE-3D"),
]  # fmt: skip


@pytest.mark.parametrize("row", ADAPTER_FILES, ids=Row.name)
def test_a_malformed_adapter_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


@pytest.mark.parametrize("row", VAES, ids=Row.name)
def test_a_malformed_vae_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
