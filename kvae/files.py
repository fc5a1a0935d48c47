"""Weight files: safetensors only, checked when opened, recognised by their keys, written completely or not at all."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import WeightsError
from .paths import check_regular, written_whole


class Weights:
    """An open safetensors file, whose tensors are read one at a time.

    Attributes:
        metadata: the texts in the file's header, by key.
        shapes: the shape of each tensor, by key.

    Raises:
        WeightsError: the file is missing, a pickle, truncated, or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        check_regular(self.path)
        if self.path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            raise WeightsError(
                f"{self.path}: a pickle can run code when opened, so it was not; expected a .safetensors file"
            )
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{self.path}: cut short or not a safetensors file ({error}); download or make it again"
            ) from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


def save_weights(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. After a failure, whatever was at `path` before is unchanged.

    Raises:
        WeightsError: the disk is full, the path cannot be written, or the format does not support a tensor's dtype.
        TypeError: the metadata is not text.
    """
    header = _header(path, tensors, metadata)
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in _in_order(tensors):
            _write_values(file, tensors[key])


# the types of https://huggingface.co/docs/safetensors that PyTorch has
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys by the size of an element, then by name, so that every tensor starts at a multiple of its element's size."""
    return sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))


def _header(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The JSON in front of the values, padded to a multiple of 8 bytes."""
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise TypeError(f"metadata is {dict(metadata)}; expected text for every key")
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in _in_order(tensors):
        tensor = tensors[key]
        if tensor.dtype not in _DTYPES:
            raise WeightsError(f"{path}: could not be written ({key} is {tensor.dtype}, which safetensors lacks)")
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    # lone surrogates, from file names in other encodings, would make a file that no reader accepts
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    return text + b" " * (-len(text) % 8)


def _write_values(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        # without a copy, and without NumPy, which PyTorch does not require
        file.write((ctypes.c_ubyte * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()))


# one key of each kind of file that people may confuse with a KVAE, the most specific first
_SIGNATURES = (
    ("encoder.mid_block.attentions.0.norm.gamma", "a HunyuanVideo 1.5 VAE"),
    ("encoder.mid.attn_1.norm.gamma", "a HunyuanVideo 1.5 VAE"),  # a KVAE-3D has no attention
    ("encoder.mid.block_1.norm1.gamma", "a KVAE-3D 2.0"),
    ("decoder.mid.block_1.norm1.conv_y.weight", "a KVAE-3D"),
    ("decoder.up_blocks.0.resnets.0.conv1.conv.weight", "a HunyuanVideo VAE"),
    ("decoder.mid.attn_1.q.weight", "a HunyuanVideo VAE (ComfyUI keys) or an image VAE"),
    ("decoder.middle.0.residual.0.gamma", "a Wan VAE"),
    ("decoder.up_blocks.0.resnets.0.conv1.weight", "an image VAE"),
    ("blocks.0.conv1.weight", "a latent adapter"),
    ("affine.conv.weight", "a latent adapter"),
)
_PREFIXES = (
    ("model.diffusion_model.", "a checkpoint with a diffusion model"),
    ("double_blocks.", "a diffusion model"),
    ("transformer_blocks.", "a diffusion model"),
    ("visual_transformer_blocks.", "a diffusion model"),
)


def what_is(keys: Iterable[str]) -> str:
    """The kind of file that these keys come from, in words that complete "this is …"."""
    keys = set(keys)
    for key, kind in _SIGNATURES:
        if key in keys:
            return kind
    for prefix, kind in _PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return kind
    return "not a file this project knows"
