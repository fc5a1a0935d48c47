"""Choose how to compute a clip within a memory budget, by adding up beforehand what `kvae.strips` will hold.

    plan = plan_decode(kvae, z.shape, budget=6_000_000_000)
    print(plan)                                # segments of 16 frames, strips of 64 MB, …: 5.8 GB
    video = kvae.decode(z, plan.method)

Counted are the tensors that a segment makes: activations, what the stream remembers, and on a CPU the working memory of
`kvae.winograd`; not the weights, the latents, the clip, or what a convolution's kernel takes for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import nn

from . import winograd
from .affine import STATISTICS_BYTES
from .coders import Coder
from .config import SEGMENT_FRAMES
from .frames import padded_frames
from .layers import CausalConv3d, ResnetBlock
from .model import KVAE
from .resample import Downsample, Upsample
from .rows import even_strips
from .strips import Method
from .tiles import tiles

STRIP_BYTES = (256 << 20, 64 << 20, 16 << 20)  # smaller ones keep the hardware less busy
RECOMPUTE_COST = (1.0, 1.1, 1.6)  # of `Method.recompute`, in operations, about
MOST_TILES = 4  # along an axis
MARGIN = 1.05  # small tensors that are not counted; measured on small and published widths, see docs/kvae.md


@dataclass(frozen=True)
class Plan:
    """A method, and the most bytes that it is going to hold."""

    method: Method
    peak: int

    def __str__(self) -> str:
        again = ("", ", upsampled maps computed again", ", upsampled and inner maps computed again")
        rows, columns = self.method.tiles
        tiled = f"{rows}x{columns} tiles, " if rows * columns > 1 else ""
        return (
            f"{tiled}segments of {self.method.segment} frames, strips of {self.method.strip_bytes >> 20} MB"
            f"{again[self.method.recompute]}: {self.peak / 1e9:.2f} GB"
        )


class BudgetError(ValueError):
    """Nothing fits the budget; `least` is the plan that comes nearest."""

    def __init__(self, budget: int, least: Plan):
        super().__init__(
            f"the budget is {budget / 1e9:.2f} GB; the least memory this takes is {least.peak / 1e9:.2f} GB "
            "beside the weights: give more, or a smaller picture"
        )
        self.least = least


def plan_decode(kvae: KVAE, z_shape: Sequence[int], budget: int | None = None, stream: bool = False) -> Plan:
    """The fastest exact way to decode latents of shape [B, c, t, h, w] within `budget` bytes.

    Args:
        stream: for `decode_stream`, which does not take tiles.

    Raises:
        BudgetError: there is none.
    """
    return _plan(kvae, kvae.decoder, z_shape, 1, budget, stream)


def plan_encode(kvae: KVAE, x_shape: Sequence[int], budget: int | None = None, stream: bool = False) -> Plan:
    """The fastest exact way to encode pixels of shape [B, 3, T, H, W] within `budget` bytes.

    Args:
        stream: for `encode_stream`, which does not take tiles.

    Raises:
        BudgetError: there is none.
    """
    side, cadence = kvae.config.spatial_factor, kvae.config.temporal_compress_times
    B, C, T, H, W = x_shape
    shape = B, C, padded_frames(T, cadence), side * -(-H // side), side * -(-W // side)
    return _plan(kvae, kvae.encoder, shape, side, budget, stream)


def _plan(kvae: KVAE, coder: Coder, shape: Sequence[int], side: int, budget: int | None, stream: bool) -> Plan:
    """For a source [B, C, T, H, W] of so many rows and columns per latent."""
    B, _, T, H, W = shape
    decode = coder is kvae.decoder
    tilings = {count: Tiling(kvae, (H // side, W // side), count, decode) for count in _tile_counts(kvae, stream)}

    def peak(method: Method) -> int:
        count = Count(kvae, coder, method, B)
        rows, columns = (n * side for n in tilings[method.tiles].largest)
        length = method.segment // (kvae.config.temporal_compress_times if decode else 1)
        kinds = _lengths(T, length)
        return int(MARGIN * max(count.segment(n, rows, columns, *ends, latent=decode) for n, ends in kinds))

    plans = []
    for method in _methods(kvae, tilings):
        plans.append(Plan(method, peak(method)))
        if budget is None or plans[-1].peak <= budget:
            return plans[-1]
    raise BudgetError(budget, min(plans, key=lambda plan: plan.peak))  # type: ignore[arg-type]


def _tile_counts(kvae: KVAE, stream: bool) -> list[tuple[int, int]]:
    most = MOST_TILES if kvae.config.per_position and not stream else 1
    return list(product(range(1, most + 1), range(1, most + 1)))


class Tiling:
    """The tiles of a picture of h x w latents, as far as plans need them.

    Attributes:
        largest: rows and columns, in latents, of the largest tile with its halo.
        work: what is computed in all, halos included, in pictures.
    """

    def __init__(self, kvae: KVAE, sides: tuple[int, int], counts: tuple[int, int], decode: bool):
        outer = [[hi - lo for lo, hi in tile.outer] for tile in tiles(kvae.config, *sides, counts, decode)]
        self.largest = [max(lengths) for lengths in zip(*outer, strict=True)]
        self.work = sum(map(prod, outer)) / prod(sides)


def _methods(kvae: KVAE, tilings: dict[tuple[int, int], Tiling]) -> list[Method]:
    """All there are, from the fastest on."""
    cadence = kvae.config.temporal_compress_times
    segments = (SEGMENT_FRAMES, 2 * cadence, cadence) if kvae.config.per_position else (SEGMENT_FRAMES,)
    choices = product(segments, STRIP_BYTES, range(3))
    methods = [Method(*choice, tiles=count) for choice in choices for count in tilings]

    def cost(method: Method) -> float:
        short = 1 + 0.02 * segments.index(method.segment) + 0.01 * STRIP_BYTES.index(method.strip_bytes)
        return RECOMPUTE_COST[method.recompute] * short * tilings[method.tiles].work

    return sorted(methods, key=cost)


def _lengths(total: int, rest: int) -> set[tuple[int, tuple[bool, bool]]]:
    """(length, (is the first, is the last)) of the kinds of segment that a clip is cut into."""
    lengths = [min(rest + 1, total)]
    while sum(lengths) < total:
        lengths.append(min(rest, total - sum(lengths)))
    return {(n, (i == 0, i == len(lengths) - 1)) for i, n in enumerate(lengths)}


class Count:
    """Adds up, along the stages of a coder, what the functions of `kvae.strips` hold at one time."""

    def __init__(self, kvae: KVAE, coder: Coder, method: Method, batch: int):
        self.coder, self.method = coder, method
        self.group = not kvae.config.per_position
        self.item = kvae.decoder.conv_out.conv.weight.element_size()
        self.unit = batch * self.item  # bytes of one value for all clips

    def segment(self, T: int, H: int, W: int, first: bool, last: bool, latent: bool) -> int:
        """The peak of one segment that enters the coder with these sides; `latent`: as what conditions the norms."""
        self.T, self.H, self.W, self.first, self.last = T, H, W, first, last
        self.latent = (T, W) if latent else None
        self.peak = 0
        self.now = 0 if first else sum(self._memory(*layer) for layer in self._remembering())
        self.lazy = 0  # bytes of a row's worth of what is computed on demand before the current layer reads it
        self.held = 0  # bytes of the map that the current layer reads, where it is held
        self.shrunk = 1  # 4 where the next past is remembered at half the rows and columns, and computed again
        self._convolution(self.coder.conv_in, held_output=latent)
        for stage in self.coder.stages():
            if isinstance(stage, ResnetBlock):
                self._resnet(stage)
            elif isinstance(stage, Downsample):
                self._downsample(stage)
            elif isinstance(stage, Upsample):
                self._upsample(stage)
        self._convolution(self.coder.conv_out, held_output=True, normed=True)
        return self.peak

    def _remembering(self) -> Iterator[tuple[int, int, int, int]]:
        """(channels, frames, rows, columns) of all that the stream remembers."""
        H, W = self.H, self.W
        small = H, W  # of what the next convolution's past is computed from
        yield self.coder.conv_in.conv.in_channels, 2, H, W
        for stage in self.coder.stages():
            if isinstance(stage, ResnetBlock):
                yield stage.conv1.conv.in_channels, 2, *small
                small = H, W
                yield stage.conv2.conv.in_channels, 2, H, W
            elif isinstance(stage, Downsample):
                H, W = H // 2, W // 2
                if hasattr(stage, "temporal_conv"):
                    yield stage.linear.in_channels, 1, H, W
            elif isinstance(stage, Upsample):
                if hasattr(stage, "temporal_conv"):
                    yield stage.linear.in_channels, 1, H, W
                small = (H, W) if self.method.recompute else (2 * H, 2 * W)
                H, W = 2 * H, 2 * W
                continue
            small = H, W
        yield self.coder.conv_out.conv.in_channels, 2, H, W

    def _memory(self, channels: int, frames: int, H: int, W: int) -> int:
        return self.unit * channels * frames * H * W

    def _map(self, channels: int) -> int:
        return self.unit * channels * self.T * self.H * self.W

    def _touch(self, extra: int) -> None:
        self.peak = max(self.peak, self.now + extra)

    def _rows(self, row_bytes: int, most: int) -> int:
        return max(hi - lo for lo, hi in even_strips(self.H, most // max(1, row_bytes)))

    def _row(self, conv: nn.Conv3d) -> int:
        return self.unit * (conv.in_channels + conv.out_channels) * (self.T + 2) * (self.W + 2)

    def _strip(self, conv: nn.Conv3d, lazy: int, add: bool) -> int:
        """What one strip of a convolution holds, the strip before it included."""
        cin, cout = conv.in_channels, conv.out_channels
        rows = self._rows(lazy + self._row(conv), self.method.strip_bytes)
        padded = self.unit * cin * (self.T + 2) * (rows + 2) * (self.W + 2)
        out = self.unit * cout * self.T * rows * self.W
        pending = 0 if rows == self.H else out
        affine = 0
        if self.latent:
            t, w = self.latent
            affine = (2 * self.item + 16) * (self.unit // self.item) * cin * t * w * (rows + 2)
        sides = self.T, rows, self.W
        work = winograd.workspace(conv, *sides) if winograd.pays(conv, *sides) else 0
        return pending + lazy * (rows + 2) + max(padded + max(out + work, affine), (2 if add else 1) * out)

    def _statistics(self, channels: int, lazy: int) -> None:
        if self.group:
            row = self.unit // self.item * channels * self.T * self.W * 4
            rows = self._rows(row, STATISTICS_BYTES)
            self._touch(rows * (2 * row + lazy))

    def _keep(self, channels: int, frames: int = 2) -> int:
        """What a layer will remember; nothing after the last segment."""
        return 0 if self.last else self._memory(channels, frames, self.H, self.W)

    def _forget(self, channels: int, frames: int = 2, shrunk: int = 1) -> None:
        if not self.first:
            self.now -= self._memory(channels, frames, self.H, self.W) // shrunk

    def _convolution(self, layer: CausalConv3d, held_output: bool, normed: bool = False) -> None:
        cin, cout = layer.conv.in_channels, layer.conv.out_channels
        if normed:
            self._statistics(cin, self.lazy)
        self.now += self._keep(cin)
        if held_output:
            self._touch(self._output(layer.conv, self.lazy))
            self._forget(cin)
            self.now += self._map(cout) - self.held
            self.held, self.lazy = self._map(cout), 0
        else:
            self._forget(cin)
            self.held, self.lazy = 0, self._row(layer.conv)

    def _output(self, conv: nn.Conv3d, lazy: int, add: bool = False, new: bool = True) -> int:
        """A held map in the making: its strips, and the map itself unless one strip is all of it."""
        whole = self._rows(lazy + self._row(conv), self.method.strip_bytes) == self.H
        return self._strip(conv, lazy, add) + (self._map(conv.out_channels) if new and not whole else 0)

    def _resnet(self, block: ResnetBlock) -> None:
        cin, cout = block.conv1.conv.in_channels, block.conv1.conv.out_channels
        lazy, shrunk = self.lazy, self.shrunk
        self._statistics(cin, lazy)
        if self.method.recompute < 2:
            self.now += self._keep(cin) // shrunk
            self._touch(self._output(block.conv1.conv, lazy))
            self.now += self._map(cout)
            self._statistics(cout, 0)
            self.now += self._keep(cout)
            self._touch(self._output(block.conv2.conv, 0, add=True, new=False) + lazy)
        else:
            inner = lazy + self._row(block.conv1.conv)
            self._statistics(cout, inner)
            self.now += self._keep(cin) // shrunk + self._keep(cout)
            in_place = self.held == self._map(cout)
            self._touch(self._output(block.conv2.conv, inner, add=True, new=not in_place))
            self.now += 0 if in_place else self._map(cout)
            self.held = 0 if in_place else self.held
        self._forget(cin, shrunk=shrunk)
        self._forget(cout)
        self.now -= self.held
        self.held, self.lazy, self.shrunk = self._map(cout), 0, 1

    def _downsample(self, layer: Downsample) -> None:
        cout = layer.linear.in_channels
        self.H, self.W = self.H // 2, self.W // 2
        small = self._map(cout)
        rows = self._rows(self.held // self.H, self.method.strip_bytes)
        self._touch(small + (self.held + small) * rows // self.H)
        self.now += small - self.held
        if hasattr(layer, "temporal_conv"):
            self.T = (self.T + 1) // 2
            self.now += self._keep(cout, frames=1)
            self._touch(small * 3 // 2 + self.unit * cout * 2 * self.H * self.W)
            self._forget(cout, frames=1)
            self.now += self._map(cout) - small
        self.held = self._map(cout)

    def _upsample(self, layer: Upsample) -> None:
        channels = layer.linear.in_channels
        if hasattr(layer, "temporal_conv"):
            before = self.held
            self.now += self._keep(channels, frames=1)
            self.T = 2 * self.T - self.first
            self._touch(before + self._map(channels) + before)
            self._forget(channels, frames=1)
            self.now += self._map(channels) - before
            self.held = self._map(channels)
        small = self.held
        self.H, self.W = 2 * self.H, 2 * self.W
        row = 2 * self.unit * channels * self.T * self.W
        if self.method.recompute:
            self.lazy, self.shrunk = row, 4
            return
        rows = self._rows(row, self.method.strip_bytes)
        out = self._map(channels)
        self._touch(out + row * rows)
        self.now += out - small
        self.held = out
