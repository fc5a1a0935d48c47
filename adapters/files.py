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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from ..kvae.engine.count import Conversion
from ..kvae.engine.layout import fastest_format
from ..kvae.errors import WeightsError
from ..kvae.files import Weights, save_weights, what_is
from ..kvae.finite import all_finite
from ..kvae.foreign import build, parse_object
from ..kvae.frames import pieces_of
from ..kvae.layers import Cache
from ..kvae.signature import same_weights
from .networks import CausalNet, Network, PointwiseNet, build_network, network_name
from .published import PUBLISHED_FILES
from .shuffle import shuffled, unshuffled
from .spaces import LatentSpace, grid_ratios, latent_space
from .weights import VAEWeights, in_words

FORMAT = "kvae-latent-adapter/1"
FORMAT_OF_TWO_GRIDS = "kvae-latent-adapter/2"
FORMATS = FORMAT, FORMAT_OF_TWO_GRIDS
PIECE = 4  # latent frames that are converted at a time; at the start one more, as in KVAE's segments
MOST_SHOWN = 600  # characters in a line of `about`


class LatentAdapter(nn.Module):
    """A network and the two spaces that it maps between, raw latents to raw latents.

    If one space has the finer grid, the network works on the coarser: see `shuffle`.

    Args:
        training: the data and settings it was trained with.
        metrics: the quality it reached.
        weights: the weights of the VAE of each space, by the space's name, if known.

    Attributes:
        ratios: rows, and columns, of a source latent and of a target latent for one of the network's grid.

    Raises:
        ValueError: no adapter maps between the spaces.
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
        self.ratios = grid_ratios(source, target)
        self.training_info, self.metrics = training or {}, metrics or {}
        self.weights = dict(weights or {})

    def about(self) -> str:
        """Direction, training and metrics as text, one line each. Paths are cut to their last part."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        maps = f"{self.source.name} → {self.target.name}"
        if self.ratios != (1, 1):
            maps += ", latents " + " → ".join(f"{ratio}x{ratio}" for ratio in self.ratios)
        lines = [f"{maps}, {network_name(self.network).capitalize()}, {count:,} weights"]
        lines += [f"training {key}: {_without_folders(value)}" for key, value in self.training_info.items()]
        lines += [f"{key}: {_without_folders(value)}" for key, value in self.metrics.items()]
        return "\n".join(line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}…" for line in lines)

    def fits(self, name: str, signature: Sequence[float]) -> bool:
        """Whether it was made for the VAE of the space `name` with this signature; True if either is unknown."""
        return same_weights(self.weights[name].signature, signature) if name in self.weights else True

    def check_fits(self, name: str, signature: Sequence[float]) -> None:
        """Raise if it was made for a VAE of the space `name` with other weights.

        Raises:
            WeightsError: the signatures differ.
        """
        if not self.fits(name, signature):
            raise WeightsError(
                f"this {self.source.name} → {self.target.name} adapter was made for "
                f"{in_words(name, self.weights[name])}; this is {in_words(name, VAEWeights('', tuple(signature)))}: "
                "its latents would be misread; use the adapter that was made for this VAE, or train one"
            )

    def forward(self, z_Bcthw: Tensor, cache: Cache | None = None) -> Tensor:
        """Raw latents [B, c, t, h, w] of the source space → raw [B, c', t, h', w'] of the target space, same dtype.

        Args:
            cache: the state of a stream, if the clip comes in pieces; see `networks`.
                `stream` and `convert` need less memory than one call for the whole clip.

        Raises:
            ValueError: the latent has other dimensions or channels, or rows or columns that the target's coarser grid
                does not divide.
        """
        self.check_shape(z_Bcthw.shape)
        return self._mapped(unshuffled(z_Bcthw, self.ratios[0]), cache)

    def stream(self, z_Bcthw: Tensor) -> Iterator[Tensor]:
        """Yield the converted latent of a whole clip in pieces of 5, 4, 4 … frames: the same values in little memory.

        Raises:
            ValueError: as `forward`.
        """
        self.check_shape(z_Bcthw.shape)
        joins, layout = self.ratios[0], fastest_format(z_Bcthw.device)  # so that no result depends on the caller's
        sees_all = not isinstance(self.network, CausalNet)
        cache = self.network.start(unshuffled(z_Bcthw, joins) if sees_all else z_Bcthw)
        for piece in pieces_of(z_Bcthw, PIECE + 1, PIECE):
            yield self._mapped(unshuffled(piece, joins).contiguous(memory_format=layout), cache)

    def convert(self, z_Bcthw: Tensor) -> Tensor:
        """The result of `forward` for a whole clip, except for rounding, in little memory.

        Raises:
            ValueError: as `forward`.
        """
        self.check_shape(z_Bcthw.shape)
        joins, splits = self.ratios
        h, w = (n // joins * splits for n in z_Bcthw.shape[3:])
        shape, layout = (len(z_Bcthw), self.target.channels, z_Bcthw.shape[2], h, w), fastest_format(z_Bcthw.device)
        y, start = torch.empty(shape, dtype=z_Bcthw.dtype, device=z_Bcthw.device, memory_format=layout), 0
        for piece in self.stream(z_Bcthw):
            y[:, :, start : start + piece.shape[2]] = piece
            start += piece.shape[2]
        return y

    def conversion(self, t: int, h: int, w: int, dtype: torch.dtype) -> Conversion:
        """What `stream` takes for latents [1, c, t, h, w] of this dtype, with the pieces that a reader holds."""
        joins, config = self.ratios[0], self.network.config
        weight, frames, h, w = next(self.network.parameters()), min(t, PIECE + 1), -(-h // joins), -(-w // joins)
        busy, kept = (weight.itemsize * n for n in self.network.values(frames, h, w))
        source, made = (frames * h * w * config[end] for end in ("in_channels", "out_channels"))
        busy += source * dtype.itemsize
        if dtype != weight.dtype:
            busy += source * weight.itemsize + made * dtype.itemsize
        start = busy
        if joins > 1 and not isinstance(self.network, CausalNet):  # it sees the whole clip before the first piece
            start += t * h * w * config["in_channels"] * dtype.itemsize
        piece = (PIECE + 1) * h * w * config["out_channels"] * dtype.itemsize
        if t == frames:  # there is one piece; the reader copies it to memory for a full one
            held = made * dtype.itemsize + piece
            return Conversion(max(start, kept + max(busy, held)), kept + held)
        # the piece that is decoded, the one after it, and the last that was made, of which that is a copy
        kept += 3 * piece
        return Conversion(max(start, kept + max(busy, 2 * piece)), kept)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise unless this is the shape of a latent that can be converted.

        Raises:
            ValueError: as `forward`.
        """
        if len(shape) != 5 or shape[1] != self.source.channels:
            raise ValueError(
                f"latent has shape {list(shape)}; a {self.source.name} latent is [B, {self.source.channels}, t, h, w]"
            )
        joins, (h, w) = self.ratios[0], shape[3:]
        if h % joins or w % joins:
            multiple = joins * self.source.spatial_factor
            width, height = (multiple * max(1, n // joins) for n in (w, h))
            raise ValueError(
                f"This latent has {h} rows and {w} columns; {self.target.name} joins {joins}x{joins} of them into one: "
                f"make pictures with sides that are multiples of {multiple} pixels, for example {width}x{height}"
            )

    def _mapped(self, x_Bcthw: Tensor, cache: Cache | None) -> Tensor:
        """Latents of the target space from those of the source on the network's grid."""
        # an adapter is small and stays in float32, even if the VAE is in bfloat16
        dtype = next(self.network.parameters()).dtype
        return shuffled(self.network(x_Bcthw.to(dtype), cache).to(x_Bcthw.dtype), self.ratios[1])


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


def _without_folders(value: Any) -> Any:
    """A value from a file's metadata without folder names: an absolute path, of any system, becomes its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value
