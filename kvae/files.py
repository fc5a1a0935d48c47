"""Weight files: safetensors only, opened with care, recognised by their keys, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class WeightsError(ValueError):
    """A file cannot be read or written as asked. The message names what was found, what was expected and what to do."""


class Weights:
    """An open safetensors file: `metadata` (str → str) and `shapes` (key → tuple), tensors read one at a time.

    Raises:
        WeightsError: the file is missing, is a pickle, is cut short or is not safetensors.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise WeightsError(f"{self.path}: no such file")
        if self.path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            raise WeightsError(
                f"{self.path}: a pickle can run code when it is opened, so it is not; expected a .safetensors file"
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
    """Write a safetensors file; on any failure the old file, or no file, is what is left.

    Raises:
        WeightsError: no room, or no right to write there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask says; safetensors alone would write 0600
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial, dict(metadata))
        partial.chmod(mode)
        os.replace(partial, path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: could not be written ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


# one key of each kind of file that people have beside a KVAE, most telling first
_SIGNATURES = (
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
    """The kind of file these keys come from, as words that complete "this is …"."""
    keys = set(keys)
    for key, kind in _SIGNATURES:
        if key in keys:
            return kind
    for prefix, kind in _PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return kind
    return "not a file this project knows"
