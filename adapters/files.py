"""Adapter files: a network between two latent spaces that says so itself.

The metadata of the safetensors file holds `source_space`, `target_space`, `network` (JSON), `latents`, `pixels`,
`weights` (JSON: of which VAEs), `training` (JSON: on what, how) and `metrics` (JSON). The published files hold none:
they are known by their keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from ..kvae.files import Weights, WeightsError, save_weights, what_is
from ..kvae.finite import all_finite
from ..kvae.foreign import build, parse_object
from ..kvae.layers import Cache
from ..kvae.signature import same_weights
from .networks import NETWORKS, Network, PointwiseNet, build_network
from .spaces import LatentSpace, latent_space

FORMAT = "kvae-latent-adapter/1"
PUBLISHED_FILES = {
    "adapter_hunyuan_to_kvae3d.safetensors": ("hunyuan_video", "kvae_3d_1.0"),
    "adapter_kvae3d_to_hunyuan.safetensors": ("kvae_3d_1.0", "hunyuan_video"),
}
MOST_SHOWN = 600  # characters of a line of `about`


@dataclass(frozen=True)
class VAEWeights:
    """Which weights a VAE had: the hash of their file, and what they are whatever file they are in."""

    sha256: str = ""
    signature: tuple[float, ...] = ()  # see kvae.signature


class LatentAdapter(nn.Module):
    """A network together with the spaces it maps between, raw latents to raw latents.

    Args:
        training: what it was trained on and how.
        metrics: what it reached.
        weights: of the VAE of each space, by the space's name, as far as they are known.
    """

    def __init__(
        self,
        network: Network,
        source: LatentSpace,
        target: LatentSpace,
        training: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        weights: Mapping[str, VAEWeights] | None = None,
    ):
        super().__init__()
        self.network = network
        self.source, self.target = source, target
        self.training_info, self.metrics = training or {}, metrics or {}
        self.weights = dict(weights or {})

    def about(self) -> str:
        """What it maps, on what it was trained and what it reached, one line each; of paths, the last part alone."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        lines = [f"{self.source.name} → {self.target.name}, {type(self.network).__name__}, {count:,} weights"]
        lines += [f"training {key}: {_without_folders(value)}" for key, value in self.training_info.items()]
        lines += [f"{key}: {_without_folders(value)}" for key, value in self.metrics.items()]
        return "\n".join(line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}…" for line in lines)

    def fits(self, name: str, signature: Sequence[float]) -> bool:
        """Whether it is for the VAE of the space `name` that has these weights, as far as the two are known."""
        return same_weights(self.weights[name].signature, signature) if name in self.weights else True

    def check_fits(self, name: str, signature: Sequence[float]) -> None:
        """Refuse a VAE with other weights than it was trained for.

        Raises:
            WeightsError: it is for other weights of that space.
        """
        if not self.fits(name, signature):
            raise WeightsError(
                f"this {self.source.name} → {self.target.name} adapter was made for a {name} VAE with other weights: "
                "their latents mean something else; use the adapter that was made for this VAE, or train one"
            )

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
        "weights": json.dumps({name: asdict(weights) for name, weights in adapter.weights.items()}),
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
    return PUBLISHED_FILES.get(Path(path).name)


def weights_of(path: str | os.PathLike) -> dict[str, tuple[float, ...]]:
    """Signatures of the VAEs an adapter file was made for, by the names of their spaces, from its header alone.

    Raises:
        WeightsError: missing, damaged, or not safetensors.
    """
    try:
        return {name: each.signature for name, each in _made_for(Weights(path).metadata).items()}
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: its metadata is not that of an adapter ({error})") from None


def load_adapter(
    path: str | os.PathLike, direction: tuple[str, str] | None = None, device: str | torch.device = "cpu"
) -> LatentAdapter:
    """Read an adapter, strictly, in float32 and eval mode, frozen.

    Args:
        direction: (source, target) space names. Checked against the file's own; needed for a published file that no
            longer has its published name.

    Raises:
        WeightsError: not an adapter, damaged, without a direction, or of another direction than asked.
    """
    weights = Weights(path)
    with torch.device("meta"):  # a description may be of anything, and costs nothing there
        adapter = _described(weights) if _says_what_it_is(weights) else _published(weights, direction)
    found = adapter.source.name, adapter.target.name
    if direction and direction != found:
        raise WeightsError(
            f"{path}: this adapter maps {found[0]} → {found[1]}; expected {direction[0]} → {direction[1]}"
            + (": the two files are swapped" if direction == found[::-1] else "")
        )
    expected = _shapes(adapter.network)
    if weights.shapes != expected:
        wrong = sorted(key for key in expected.keys() | weights.shapes if expected.get(key) != weights.shapes.get(key))
        raise WeightsError(f"{path}: {len(wrong)} tensors do not fit its own description, first {wrong[0]}")
    adapter.network.load_state_dict({key: _sound(weights, key) for key in expected}, assign=True)
    return adapter.to(device).eval().requires_grad_(False)


def _says_what_it_is(weights: Weights) -> bool:
    """Whether the metadata describes it.

    Raises:
        WeightsError: it does, in a format that is not known.
    """
    found = weights.metadata.get("format", "")
    if found != FORMAT and found.startswith(FORMAT.partition("/")[0]):
        raise WeightsError(
            f"{weights.path}: an adapter of the format {found}; {FORMAT} is known here: update this pack"
        )
    return found == FORMAT


def _described(weights: Weights) -> LatentAdapter:
    """The adapter that the metadata describes, without its weights.

    Raises:
        WeightsError: it describes none.
    """
    metadata = weights.metadata
    try:
        source, target = latent_space(metadata["source_space"]), latent_space(metadata["target_space"])
        settings = parse_object(metadata["network"])
        if isinstance(settings.get("blocks"), int) and settings["blocks"] > len(weights.shapes):
            raise ValueError(f"{settings['blocks']} blocks in {len(weights.shapes)} tensors")
        network = build_network(str(settings.pop("name")), **settings)
        channels = network.config["in_channels"], network.config["out_channels"]
        if channels != (source.channels, target.channels):
            raise ValueError(f"a network from {channels[0]} to {channels[1]} channels, {source.name} → {target.name}")
        return LatentAdapter(
            network,
            source,
            target,
            parse_object(metadata.get("training", "{}")),
            parse_object(metadata.get("metrics", "{}")),
            _made_for(metadata),
        )
    except (ArithmeticError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{weights.path}: its metadata is not that of an adapter ({error})") from None


def _made_for(metadata: Mapping[str, str]) -> dict[str, VAEWeights]:
    """Raises a ValueError where the metadata is not of an adapter."""
    return {name: build(VAEWeights, each) for name, each in parse_object(metadata.get("weights", "{}")).items()}


def _published(weights: Weights, direction: tuple[str, str] | None) -> LatentAdapter:
    """An adapter as the published files hold it, without its weights.

    Raises:
        WeightsError: it has other tensors, or says nothing of its direction and has none of the published names.
    """
    path, network = weights.path, PointwiseNet(16, 16)
    if weights.shapes != _shapes(network):
        kind = what_is(weights.shapes)
        if kind == "a latent adapter":
            raise WeightsError(
                f"{path}: this is a latent adapter that does not say what it maps (no metadata of the format {FORMAT}) "
                "and not of the published shape; use the file as it was written"
            )
        raise WeightsError(f"{path}: this is {kind}; expected a latent adapter")
    known = PUBLISHED_FILES.get(path.name) or direction
    if known is None:
        raise WeightsError(
            f"{path}: a published adapter does not say which way it maps; name it "
            f"{' or '.join(PUBLISHED_FILES)}, or give the direction"
        )
    return LatentAdapter(network, latent_space(known[0]), latent_space(known[1]))


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _sound(weights: Weights, key: str) -> Tensor:
    """A tensor of the file, in float32.

    Raises:
        WeightsError: it is not of floats, or not finite.
    """
    tensor = weights[key]
    if not tensor.is_floating_point():
        raise WeightsError(f"{weights.path}: {key} is of {tensor.dtype}; expected weights of a float type")
    if not all_finite(tensor):
        raise WeightsError(f"{weights.path}: {key} holds values that are not finite numbers; train or get it again")
    return tensor.to(torch.float32, copy=True)  # the file's own bytes are mapped: it could not be replaced on Windows


def _without_folders(value: Any) -> Any:
    """What a file says, fit to be shown to others: of an absolute path, on any system, the last part."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value
