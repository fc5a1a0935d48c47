"""What computing a segment holds at one time, added up beforehand along the functions of `kvae.strips`.

Counted are the tensors that a segment makes: activations, what the stream remembers, and on a CPU the working memory of
`kvae.winograd`; not the weights, the latents, the clip, or what a convolution's kernel takes for itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from . import winograd
from .affine import STATISTICS_BYTES
from .coders import Coder
from .layers import CausalConv3d, ResnetBlock
from .model import KVAE
from .resample import Downsample, Upsample
from .rows import even_strips
from .strips import Method, tail_frames


class Count:
    """Adds up, along the stages of a coder, what the functions of `kvae.strips` hold at one time."""

    def __init__(self, kvae: KVAE, coder: Coder, method: Method, batch: int):
        self.coder, self.method = coder, method
        self.group = not kvae.config.per_position
        self.on_demand = coder.full_resolution() if method.recompute > 2 else ()
        self.item = kvae.decoder.conv_out.conv.weight.element_size()
        self.unit = batch * self.item  # bytes of one value for all clips

    def segment(self, T: int, H: int, W: int, first: bool, last: bool, latent: bool) -> int:
        """The peak of one segment that enters the coder with these sides; `latent`: as what conditions the norms."""
        self.T, self.H, self.W, self.first, self.last = T, H, W, first, last
        self.latent = (T, W) if latent else None
        self.peak = 0
        self.now = 0 if first else sum(self._memory(*layer) for layer in self._remembering())
        self.lazy = 0  # bytes of a row's worth of what is computed on demand before the current layer reads it
        self.chain: Chain | None = None  # at full resolution, all that is computed on demand before the next layer
        self.held = 0  # bytes of the map that the current layer reads, where it is held
        self.shrunk = 1  # 4 where the next past is remembered at half the rows and columns, and computed again
        self._convolution(self.coder.conv_in, held_output=latent)
        for stage in self.coder.stages():
            if stage in self.on_demand:
                self._summed(stage)
            elif isinstance(stage, ResnetBlock):
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
            if stage in self.on_demand:
                continue
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
                if self._ends_held(stage):
                    yield stage.linear.in_channels, tail_frames(len(self.on_demand)), H, W
                H, W = 2 * H, 2 * W
                continue
            small = H, W
        if not self._decodes_on_demand:
            yield self.coder.conv_out.conv.in_channels, 2, H, W

    @property
    def _decodes_on_demand(self) -> bool:
        return bool(self.latent and self.on_demand)

    def _ends_held(self, stage: Upsample) -> bool:
        """Whether all after this upsampler is computed on demand."""
        return self._decodes_on_demand and stage is self.coder.up[1].upsample  # type: ignore[union-attr, index]

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

    def _strip(self, conv: nn.Conv3d, lazy: int, again: int = 0, inner: nn.Conv3d | None = None) -> int:
        """What one strip of a convolution holds, the strip before it included.

        Args:
            lazy: bytes of a row's worth of what it reads, where that is computed on demand.
            again: the same of what is added to the result.
            inner: the convolution before it, where that one is computed on demand, from `again`.
        """
        rows = self._rows(lazy + self._row(conv), self.method.strip_bytes)
        out = self.unit * conv.out_channels * self.T * rows * self.W
        pending = 0 if rows == self.H else out
        source = self._pulled(inner, again, rows + 2) if inner else lazy * (rows + 2)
        return pending + max(source, self._layer(conv, rows, bool(lazy)), out + max(again * rows, out))

    def _pulled(self, conv: nn.Conv3d, lazy: int, rows: int) -> int:
        """What computing some rows of a convolution on demand holds."""
        return max(lazy * (rows + 2), self._layer(conv, rows, bool(lazy)))

    def _layer(self, conv: nn.Conv3d, rows: int, lazy: bool) -> int:
        """Rows of a convolution's input, with borders, and then what comes on top of that."""
        cin, cout = conv.in_channels, conv.out_channels
        source = self.unit * cin * self.T * (rows + 2) * self.W if lazy else 0
        padded = self.unit * cin * (self.T + 2) * (rows + 2) * (self.W + 2)
        work = winograd.workspace(conv.weight, self.T, rows, self.W)
        past = 0 if self.first or not lazy else 3 * source // self.T * 2
        return source + padded + max(self.unit * cout * self.T * rows * self.W + work, self.affine(cin, rows), past)

    def _summed(self, block: ResnetBlock) -> None:
        """A block at full resolution of which nothing is held."""
        if self.chain is None:
            start = self.coder.up[1].upsample if self.latent else self.coder.conv_in  # type: ignore[union-attr, index]
            self.chain = Chain(start, self)
        conv = block.conv1.conv
        rows = self._rows(self.lazy, self.method.strip_bytes)
        self._gathered(conv.in_channels, rows, self.chain.pulled(self.T, rows))
        rows = self._rows(self.lazy + self._row(conv), self.method.strip_bytes)
        self._gathered(conv.out_channels, rows, self.chain.convolved(conv, self.T, rows))
        self.chain.links.append(block)
        self.lazy = self.unit * conv.out_channels * self.T * self.W

    def _gathered(self, channels: int, rows: int, pulled: int) -> None:
        """Statistics of what is computed on demand, so many rows at a time."""
        if self.group:
            copied = (self.unit + self.unit // self.item * 4) * channels * self.T * rows * self.W
            self._touch(max(copied, pulled))

    def _last_on_demand(self, conv: nn.Conv3d) -> None:
        assert self.chain is not None
        rows = self._rows(self.lazy, self.method.strip_bytes)
        self._gathered(conv.in_channels, rows, self.chain.pulled(self.T, rows))
        rows = self._rows(self.lazy + self._row(conv), self.method.strip_bytes)
        self._touch(2 * self._map(conv.out_channels) + self.chain.convolved(conv, self.T, rows))

    def affine(self, channels: int, rows: int) -> int:
        """What a conditioned norm of so many rows takes for its scale and shift."""
        if not self.latent:
            return 0
        t, w = self.latent
        return (2 * self.item + 16) * (self.unit // self.item) * channels * t * w * (rows + 2)

    def _statistics(self, channels: int, lazy: int) -> None:
        """Of a map that is held, or computed on demand by strips."""
        if lazy:
            rows = self._rows(lazy, self.method.strip_bytes)
            self._gathered(channels, rows, lazy * rows)
        elif self.group:
            row = self.unit // self.item * channels * self.T * self.W * 4
            self._touch(row * self._rows(row, STATISTICS_BYTES))

    def _keep(self, channels: int, frames: int = 2) -> int:
        """What a layer will remember; nothing after the last segment."""
        return 0 if self.last else self._memory(channels, frames, self.H, self.W)

    def _forget(self, channels: int, frames: int = 2, shrunk: int = 1) -> None:
        if not self.first:
            self.now -= self._memory(channels, frames, self.H, self.W) // shrunk

    def _convolution(self, layer: CausalConv3d, held_output: bool, normed: bool = False) -> None:
        cin, cout = layer.conv.in_channels, layer.conv.out_channels
        if self.chain:
            self._last_on_demand(layer.conv)
            return
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

    def _output(
        self, conv: nn.Conv3d, lazy: int, new: bool = True, again: int = 0, inner: nn.Conv3d | None = None
    ) -> int:
        """A held map in the making: its strips, and the map itself unless one strip is all of it."""
        whole = self._rows(lazy + self._row(conv), self.method.strip_bytes) == self.H
        return self._strip(conv, lazy, again, inner) + (self._map(conv.out_channels) if new and not whole else 0)

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
            self._touch(self._output(block.conv2.conv, 0, new=False, again=lazy))
        else:
            inner = lazy + self._row(block.conv1.conv)
            rows = self._rows(inner, self.method.strip_bytes)
            self._gathered(cout, rows, self._pulled(block.conv1.conv, lazy, rows))
            self.now += self._keep(cin) // shrunk + self._keep(cout)
            in_place = self.held == self._map(cout)
            self._touch(self._output(block.conv2.conv, inner, not in_place, lazy, block.conv1.conv))
            self.now += 0 if in_place else self._map(cout)
            self.held = 0 if in_place else self.held
        self._forget(cin, shrunk=shrunk)
        self._forget(cout)
        self.now -= self.held
        self.held, self.lazy, self.shrunk = self._map(cout), 0, 1

    def _downsample(self, layer: Downsample) -> None:
        cout, timed = layer.linear.in_channels, hasattr(layer, "temporal_conv")
        source = self._map(layer.spatial_conv.in_channels)
        rows = max(hi - lo for lo, hi in even_strips(self.H // 2, self.method.strip_bytes * self.H // (2 * source)))
        pulled = self.chain.pulled(self.T, 2 * rows + 1) if self.chain else 0
        self.H, self.W = self.H // 2, self.W // 2
        frame = self._memory(cout, 1, rows, self.W)
        framed = source * rows // self.H
        strip = max(pulled, framed * (2 if self.chain else 1) + self.T * frame)
        if timed:
            self.now += self._keep(cout, frames=1)
            # the strip, the same behind its past, and half as many frames
            strip = max(strip, (2 * self.T + 2 + (self.T + 1) // 2) * frame)
            self.T = (self.T + 1) // 2
        self._touch(self._map(cout) + strip)
        self._forget(cout, frames=1 if timed else 0)
        self.chain = None
        self.now += self._map(cout) - self.held
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
        if self._ends_held(layer) and not self.last:
            self.now += self._memory(channels, tail_frames(len(self.on_demand)), self.H, self.W)
        self.H, self.W = 2 * self.H, 2 * self.W
        row = 3 * self.unit * channels * self.T * self.W // 2
        if self.method.recompute:
            self.lazy, self.shrunk = row, 4
            return
        rows = self._rows(row, self.method.strip_bytes)
        out = self._map(channels)
        self._touch(out + row * rows)
        self.now += out - small
        self.held = out


class Chain:
    """What `kvae.strips.Summed` holds while rows of it are computed: an upsampler or a convolution, then blocks."""

    def __init__(self, start: nn.Module, count: Count):
        self.links = [start]
        self.count = count

    def pulled(self, T: int, rows: int) -> int:
        """Of the end of the chain."""
        return self._pulled(len(self.links), T, rows, tail=False)

    def convolved(self, conv: nn.Conv3d, T: int, rows: int) -> int:
        """Of a convolution of it."""
        return self._convolved(len(self.links), conv, T, rows, tail=False)

    def _part(self, channels: int, T: int, rows: int, border: int = 0) -> int:
        rows = min(rows, self.count.H) + border
        return self.count.unit * channels * T * rows * (self.count.W + border)

    def _pulled(self, n: int, T: int, rows: int, tail: bool) -> int:
        """Of the n-th link; `tail`: of the last T frames of the segment before."""
        link = self.links[n - 1]
        if isinstance(link, Upsample):
            return 3 * self._part(link.linear.in_channels, T, rows) // 2
        if isinstance(link, CausalConv3d):
            return self._layer(link.conv, T, rows)
        assert isinstance(link, ResnetBlock)
        first, second = link.conv1.conv, link.conv2.conv
        lead = 2 if tail else 0  # frames more that each convolution reads
        x = self._part(first.in_channels, T + 2 * lead, rows + 4)
        inner, y = self._part(first.out_channels, T + lead, rows + 2), self._part(first.out_channels, T, rows)
        pasts = (0, 0)
        if not (tail or self.count.first):
            pasts = self._pulled(n - 1, 2, rows + 4, True), self._convolved(n - 1, first, 2, rows + 2, True)
        return max(
            self._pulled(n - 1, T + 2 * lead, rows + 4, tail),
            x + self._layer(first, T + lead, rows + 2, pasts[0]),
            x + inner + self._layer(second, T, rows, pasts[1]),
            x + inner + 2 * y,
        )

    def _convolved(self, n: int, conv: nn.Conv3d, T: int, rows: int, tail: bool) -> int:
        lead = 2 if tail else 0
        past = 0 if tail or self.count.first else self._pulled(n, 2, rows + 2, True)
        x = self._part(conv.in_channels, T + lead, rows + 2)
        return max(self._pulled(n, T + lead, rows + 2, tail), x + self._layer(conv, T, rows, past))

    def _layer(self, conv: nn.Conv3d, T: int, rows: int, past: int = 0) -> int:
        """One convolution: its input with borders, and then what comes on top of that."""
        padded = self._part(conv.in_channels, T + 2, rows, border=2)
        rows = min(rows, self.count.H)
        work = winograd.workspace(conv.weight, T, rows, self.count.W)
        affine = self.count.affine(conv.in_channels, rows)
        return padded + max(self._part(conv.out_channels, T, rows) + work, affine, past)
