"""Adapter files: self-describing safetensors files of a network between two latent spaces.

The metadata hold `format`, `source_space`, `target_space`, `network` (JSON), `latents`, `pixels`, `weights` (JSON: the
weights of the VAEs it was made for), `training` (JSON: data and settings) and `metrics` (JSON). Between spaces of
different grids, `network` also holds `unshuffle` (see `shuffle`), and the format is the second: readers that know only
the first would run the network on a grid that it is not for. The published files have no metadata: they are recognised
by their keys, and their direction by their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..kvae.errors import WeightsError
from ..kvae.files import Weights, save_weights, what_is
from ..kvae.finite import all_finite
from ..kvae.foreign import build, parse_object
from .adapter import LatentAdapter
from .networks import Network, PointwiseNet, build_network, network_name
from .published import PUBLISHED_FILES
from .spaces import grid_ratios, latent_space
from .weights import VAEWeights

FORMAT = "kvae-latent-adapter/1"
FORMAT_OF_TWO_GRIDS = "kvae-latent-adapter/2"
FORMATS = FORMAT, FORMAT_OF_TWO_GRIDS


def save_adapter(path: str | os.PathLike, adapter: LatentAdapter) -> None:
    """Write the adapter with its description. A failure leaves no partial file.

    Raises:
        WeightsError: the file cannot be written.
    """
    ratio = max(adapter.ratios)
    settings = {"name": network_name(adapter.network)} | adapter.network.config
    metadata = {
        "format": FORMAT if ratio == 1 else FORMAT_OF_TWO_GRIDS,
        "source_space": adapter.source.name,
        "target_space": adapter.target.name,
        "network": json.dumps(settings if ratio == 1 else settings | {"unshuffle": ratio}),
        "latents": "raw [B, c, t, h, w], before any scaling_factor",
        "pixels": f"{adapter.source.name} {adapter.source.pixels}; {adapter.target.name} {adapter.target.pixels}",
        "weights": json.dumps({name: asdict(weights) for name, weights in adapter.weights.items()}),
        "training": json.dumps(adapter.training_info),
        "metrics": json.dumps(adapter.metrics),
    }
    save_weights(path, adapter.network.state_dict(), metadata)


def direction_of(path: str | os.PathLike) -> tuple[str, str] | None:
    """The names (source, target) of an adapter file's spaces, from its header or its published name; None if unknown.

    Raises:
        WeightsError: missing, damaged, or not safetensors.
    """
    metadata = Weights(path).metadata
    if metadata.get("format") in FORMATS and {"source_space", "target_space"} <= metadata.keys():
        return metadata["source_space"], metadata["target_space"]
    return PUBLISHED_FILES.get(Path(path).name)


def weights_of(path: str | os.PathLike) -> dict[str, tuple[float, ...]]:
    """Read the signatures of the VAEs that an adapter file was made for, by the names of their spaces, from its header.

    Raises:
        WeightsError: missing, damaged, or not safetensors.
    """
    try:
        return {name: each.signature for name, each in _made_for(Weights(path).metadata).items()}
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: its metadata do not describe an adapter ({error})") from None


def load_adapter(
    path: str | os.PathLike, direction: tuple[str, str] | None = None, device: str | torch.device = "cpu"
) -> LatentAdapter:
    """Load an adapter in float32 and eval mode, frozen. Every tensor must match the description.

    Args:
        direction: the expected (source, target) space names. A published file that was renamed needs them.

    Raises:
        WeightsError: not an adapter, damaged, without a direction, or with another direction than expected.
    """
    weights = Weights(path)
    with torch.device("meta"):  # a description may claim any size, which costs nothing there
        adapter = _described(weights) if _describes_itself(weights) else _published(weights, direction)
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


def _describes_itself(weights: Weights) -> bool:
    """Whether the metadata describe the adapter.

    Raises:
        WeightsError: they do, in an unknown format.
    """
    found = weights.metadata.get("format", "")
    if found not in FORMATS and found.startswith(FORMAT.partition("/")[0]):
        expected = " or ".join(FORMATS)
        raise WeightsError(f"{weights.path}: an adapter of the format {found}; expected {expected}: update this pack")
    return found in FORMATS


def _described(weights: Weights) -> LatentAdapter:
    """The adapter that the metadata describe, on the meta device.

    Raises:
        WeightsError: they do not describe an adapter.
    """
    metadata = weights.metadata
    try:
        source, target = latent_space(metadata["source_space"]), latent_space(metadata["target_space"])
        settings = parse_object(metadata["network"])
        if isinstance(settings.get("blocks"), int) and settings["blocks"] > len(weights.shapes):
            raise ValueError(f"{settings['blocks']} blocks in {len(weights.shapes)} tensors")
        ratios, unshuffle = grid_ratios(source, target), settings.pop("unshuffle", 1)
        if unshuffle != max(ratios):
            raise ValueError(f"unshuffle is {unshuffle}, {source.name} → {target.name} needs {max(ratios)}")
        network = build_network(str(settings.pop("name")), **settings)
        channels = network.config["in_channels"], network.config["out_channels"]
        if channels != tuple(s.channels * r**2 for s, r in zip((source, target), ratios, strict=True)):
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
        raise WeightsError(f"{weights.path}: its metadata do not describe an adapter ({error})") from None


def _made_for(metadata: Mapping[str, str]) -> dict[str, VAEWeights]:
    """The VAE weights that the metadata name.

    Raises:
        ValueError: they are not described as in an adapter file.
    """
    return {name: build(VAEWeights, each) for name, each in parse_object(metadata.get("weights", "{}")).items()}


def _published(weights: Weights, direction: tuple[str, str] | None) -> LatentAdapter:
    """A published adapter, which has no metadata, on the meta device.

    Raises:
        WeightsError: the tensors are others, neither the file's name nor `direction` tells the direction, or its spaces
            have other channels.
    """
    path, network = weights.path, PointwiseNet(16, 16)
    if weights.shapes != _shapes(network):
        kind = what_is(weights.shapes)
        if kind == "a latent adapter":
            raise WeightsError(
                f"{path}: this latent adapter has no metadata of the format {FORMAT}, so its direction is unknown; "
                "use the file as it was written"
            )
        raise WeightsError(f"{path}: this is {kind}; expected a latent adapter")
    known = PUBLISHED_FILES.get(path.name) or direction
    if known is None:
        raise WeightsError(
            f"{path}: the metadata do not say which way this adapter maps; rename it to "
            f"{' or '.join(PUBLISHED_FILES)}, or pass the direction"
        )
    source, target = (latent_space(name) for name in known)
    if (source.channels, target.channels) != (16, 16):
        raise WeightsError(
            f"{path}: this is a published adapter, for 16 channels on both sides; {source.name} → {target.name} has "
            f"{source.channels} and {target.channels}: train an adapter for it"
        )
    return LatentAdapter(network, source, target)


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _sound(weights: Weights, key: str) -> Tensor:
    """A tensor of the file in float32.

    Raises:
        WeightsError: it is not of a float type, or not finite.
    """
    tensor = weights[key]
    if not tensor.is_floating_point():
        raise WeightsError(f"{weights.path}: {key} is of {tensor.dtype}; expected float weights")
    if not all_finite(tensor):
        raise WeightsError(f"{weights.path}: {key} holds NaN or infinite values; download or train the adapter again")
    return tensor.to(torch.float32, copy=True)  # a copy: Windows cannot replace a file whose bytes are mapped
