"""A latent adapter: a network, the two spaces that it maps between, and what is known of it.

# B batch, c channels, t latent frames, h/w latent rows and columns
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from ..kvae.engine.count import Conversion
from ..kvae.engine.layout import fastest_format
from ..kvae.errors import WeightsError
from ..kvae.frames import pieces_of
from ..kvae.layers import Cache
from ..kvae.signature import same_weights
from .networks import CausalNet, Network, network_name
from .shuffle import shuffled, unshuffled
from .spaces import LatentSpace, grid_ratios
from .weights import VAEWeights, in_words

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
