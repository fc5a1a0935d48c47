"""Adapter files: a network between two latent spaces that says so itself.

The metadata of the safetensors file holds `source_space`, `target_space`, `network` (JSON), `latents`, `pixels`,
`training` (JSON: on what, how) and `metrics` (JSON). The published files hold none: they are known by their keys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kvae.files import Weights, WeightsError, save_weights, what_is
from ..kvae.layers import Cache
from .networks import NETWORKS, Network, Published, build_network
from .spaces import LatentSpace, space

FORMAT = "kvae-latent-adapter/1"
PUBLISHED_NAMES = {
    "adapter_hunyuan_to_kvae3d.safetensors": ("hunyuan_video", "kvae_3d_1.0"),
    "adapter_kvae3d_to_hunyuan.safetensors": ("kvae_3d_1.0", "hunyuan_video"),
}


class LatentAdapter(nn.Module):
    """A network together with the spaces it maps between, raw latents to raw latents.

    `training` says what it was trained on and how, `metrics` what it reached.
    """

    def __init__(
        self,
        network: Network,
        source: LatentSpace,
        target: LatentSpace,
        training: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.network = network
        self.source, self.target = source, target
        self.training_info, self.metrics = training or {}, metrics or {}

    def about(self) -> str:
        """What it maps, on what it was trained and what it reached, one line each."""
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        lines = [f"{self.source.name} → {self.target.name}, {type(self.network).__name__}, {weights:,} weights"]
        lines += [f"training {key}: {value}" for key, value in self.training_info.items()]
        lines += [f"{key}: {value}" for key, value in self.metrics.items()]
        return "\n".join(lines)

    def forward(self, z_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, c, t, h, w] raw in the source space → [B, c', t, h, w] raw in the target space, in the dtype given.

        Raises:
            ValueError: the latent has another number of channels.
        """
        if z_Bcthw.ndim != 5 or z_Bcthw.shape[1] != self.source.channels:
            raise ValueError(
                f"latent has shape {list(z_Bcthw.shape)}; a {self.source.name} latent is "
                f"[B, {self.source.channels}, t, h, w]"
            )
        # an adapter is small and stays in float32 beside a VAE in bfloat16
        dtype = next(self.network.parameters()).dtype
        return self.network(z_Bcthw.to(dtype), cache).to(z_Bcthw.dtype)


def save_adapter(path: str | os.PathLike, adapter: LatentAdapter) -> None:
    """Write the adapter and all it knows of itself, whole or not at all."""
    name = next(name for name, cls in NETWORKS.items() if type(adapter.network) is cls)
    metadata = {
        "format": FORMAT,
        "source_space": adapter.source.name,
        "target_space": adapter.target.name,
        "network": json.dumps({"name": name} | adapter.network.config),
        "latents": "raw [B, c, t, h, w], before any scaling_factor",
        "pixels": f"{adapter.source.name} {adapter.source.pixels}; {adapter.target.name} {adapter.target.pixels}",
        "training": json.dumps(adapter.training_info),
        "metrics": json.dumps(adapter.metrics),
    }
    save_weights(path, adapter.network.state_dict(), metadata)


def direction_of(path: str | os.PathLike) -> tuple[str, str] | None:
    """(source, target) space names of an adapter file, from its header alone; None if it does not say.

    Raises:
        WeightsError: missing, damaged, or not safetensors.
    """
    metadata = Weights(path).metadata
    if metadata.get("format") == FORMAT and {"source_space", "target_space"} <= metadata.keys():
        return metadata["source_space"], metadata["target_space"]
    return PUBLISHED_NAMES.get(Path(path).name)


def load_adapter(
    path: str | os.PathLike, direction: tuple[str, str] | None = None, device: str | torch.device = "cpu"
) -> LatentAdapter:
    """Read an adapter, strictly, in float32 and eval mode.

    Args:
        direction: (source, target) space names. Checked against the file's own; needed for a published file that no
            longer has its published name.

    Raises:
        WeightsError: not an adapter, damaged, without a direction, or of another direction than asked.
    """
    weights = Weights(path)
    if weights.metadata.get("format") == FORMAT:
        try:
            found = weights.metadata["source_space"], weights.metadata["target_space"]
            source, target = space(found[0]), space(found[1])
            settings = json.loads(weights.metadata["network"])
            network = build_network(settings.pop("name"), **settings)
            training = json.loads(weights.metadata.get("training", "{}"))
            metrics = json.loads(weights.metadata.get("metrics", "{}"))
        except (KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{path}: its metadata is not that of an adapter ({error})") from None
    else:
        network = Published(16, 16)
        if weights.shapes != {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}:
            raise WeightsError(f"{path}: this is {what_is(weights.shapes)}; expected a latent adapter")
        known = PUBLISHED_NAMES.get(Path(path).name) or direction
        if known is None:
            raise WeightsError(
                f"{path}: a published adapter does not say which way it maps; name it "
                f"{' or '.join(PUBLISHED_NAMES)}, or give the direction"
            )
        found = known
        source, target, training, metrics = space(found[0]), space(found[1]), {}, {}
    if direction and direction != found:
        raise WeightsError(
            f"{path}: this adapter maps {found[0]} → {found[1]}; expected {direction[0]} → {direction[1]}"
            + (": the two files are swapped" if direction == found[::-1] else "")
        )
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if weights.shapes != expected:
        wrong = sorted(key for key in expected.keys() | weights.shapes if expected.get(key) != weights.shapes.get(key))
        raise WeightsError(f"{path}: {len(wrong)} tensors do not fit its own description, first {wrong[0]}")
    network.load_state_dict({key: weights[key] for key in expected})
    return LatentAdapter(network, source, target, training, metrics).to(device).eval()
