"""A segment computed for its result alone: the numbers of the modules' own `forward`, in less memory and time.

Every layer runs by strips of rows. A 3x3 window needs one row beyond its strip, and the statistics of a GroupNorm are
gathered over all strips before the first is normalised, so strips are exact. Feature maps are held in memory, or are
computed on demand from others (`.rows`). What a convolution reads is normalised straight into its padded input, and
a block's output takes the place of its inner feature map.

    # B batch, C channels, T frames, H/W rows and columns, lo:hi rows
    # x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..coders import Decoder, Encoder
from ..config import SEGMENT_FRAMES
from ..layers import Cache, CausalConv3d, ResnetBlock, fill_border, like
from ..resample import Downsample, Upsample
from .affine import Affine
from .convolution import conv3d
from .rows import Held, Rows, even_strips

PAST = 2  # frames before its own that a convolution reads


@dataclass(frozen=True)
class Execution:
    """How to compute a clip; the result is the same, unless tiles overlap.

    Attributes:
        segment: frames in a segment, after the first one. Models with GroupNorm are defined by 16.
        strip_bytes: about the size of a convolution's input and output, per strip.
        recompute: 0 holds every feature map; 1 computes upsampled ones again wherever they are read; 2 also the inner
            ones of the blocks; 3 also all of the blocks at full resolution, and what they remember, which takes
            segments that are long enough for it.
        tiles: rows and columns of tiles, each computed for the whole clip before the next (see `.tiles`). Not in
            streams.
        overlap: latents that neighbouring tiles have in common, where they are blended: not exact. GroupNorm then takes
            its statistics from a version of the picture that is no larger than a tile. None: tiles with all that makes
            them exact, only where no norm runs over the picture.

    Raises:
        ValueError: a number that no model takes. What one model does not take is refused where it is used.
    """

    segment: int = SEGMENT_FRAMES
    strip_bytes: int = 64 << 20
    recompute: int = 0
    tiles: tuple[int, int] = (1, 1)
    overlap: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", tuple(self.tiles))
        if len(self.tiles) != 2:
            raise ValueError(f"tiles is {self.tiles}; expected rows and columns of tiles, such as (2, 3)")
        overlap = 0 if self.overlap is None else self.overlap
        numbers = [self.segment, self.strip_bytes, *self.tiles, self.recompute, overlap]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{self}; expected whole numbers")
        if min(numbers[:4]) < 1:
            raise ValueError(f"{self}; expected segment, strip_bytes and tiles of at least 1")
        if not 0 <= self.recompute <= 3:
            raise ValueError(f"recompute is {self.recompute}; expected 0, 1, 2 or 3")
        if overlap < 0:
            raise ValueError(f"overlap is {overlap}; expected 0 or more latents, or None for exact tiles")


class Norms(dict[tuple[int, str], tuple[Tensor, Tensor]]):
    """What GroupNorm makes of its statistics, by segment and layer: filled by one stream, used by others.

    With those of the whole picture its tiles are exact, given the halo of `.tiles`; with those of a smaller version
    of the picture, nearly so.
    """


@dataclass
class Memory:
    """What a stream remembers from segment to segment: `pasts`, the two frames before the next one that each
    convolution reads, and `cache`, that of the resamplers, or of all layers where they run by themselves."""

    pasts: dict[str, Callable[[int, int], Tensor]] = field(default_factory=dict)
    cache: Cache = field(default_factory=dict)
    norms: Norms | None = None
    segments: int = 0  # done


@dataclass
class Segment:
    """One segment on its way through a coder.

    Attributes:
        memory: of the stream; written too, unless this is the `last` segment.
        z_Bcthw: conditions the norms, in the decoder.
    """

    execution: Execution
    memory: Memory
    first: bool
    last: bool
    element_size: int  # bytes
    z_Bcthw: Tensor | None = None

    def strips(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """Bounds of strips of about the execution's size."""
        yield from even_strips(rows.shape[3], self.execution.strip_bytes // max(1, rows.row_bytes))

    def hold(self, rows: Rows, into: Held | None = None, add: Callable[[int, int], Tensor] | None = None) -> Held:
        """Compute all rows, plus those of `add`, into new memory or over a map that they are computed from.

        A strip is written after the next one has been computed, which may still read what is there.
        """
        whole = into.x if into else None
        pending: list[tuple[int, int, Tensor]] = []

        def write() -> None:
            lo, hi, part = pending.pop()
            assert whole is not None
            whole[:, :, :, lo:hi] = part

        for lo, hi in self.strips(rows):
            part = rows(lo, hi)
            if add:
                part += add(lo, hi)
            if (lo, hi) == (0, rows.shape[3]):
                return Held(part)
            if whole is None:
                whole = like(part, rows.shape)
            if pending:
                write()
            pending.append((lo, hi, part))
        write()
        assert whole is not None
        return Held(whole)


class Convolved:
    """A causal convolution of the activations of another feature map (or of the map itself, without a norm).

    Args:
        again: whether the last two frames of what it reads, its past in the next segment, are computed again there.
            Else they are kept, strip by strip; and so they are where the source has fewer, as half of that past then
            is of the segment before.
    """

    def __init__(self, segment: Segment, source: Rows, conv: CausalConv3d, norm: nn.Module | None, again: bool = False):
        B, _, T, H, W = source.shape
        self.shape = torch.Size((B, conv.conv.out_channels, T, H, W))
        self.segment, self.source, self.conv = segment, source, conv
        self.affine = self._affine(norm) if norm else None
        element = segment.element_size
        self.row_bytes = source.row_bytes + B * (source.shape[1] + self.shape[1]) * (T + 2) * (W + 2) * element
        self.lead = 0  # frames of the source before those of the output
        self.past: Callable[[int, int], Tensor] | None = segment.memory.pasts.pop(conv.name, None)
        self.future: Held | None = None
        again = again and T >= PAST
        self.keeps = not (again or segment.last)
        if again and self.affine and not segment.last:
            segment.memory.pasts[conv.name] = Activated(source.tail(2), self.affine.tail(2, T))

    def _affine(self, norm: nn.Module) -> Affine:
        norms, key = self.segment.memory.norms, (self.segment.memory.segments, self.conv.name)
        known = norms.get(key) if norms else None
        strips = self.segment.strips(self.source)
        affine = Affine(norm, self.source, strips, self.segment.z_Bcthw, self.segment.first, known)
        if norms is not None and affine.shift is not None:
            norms[key] = affine.scale, affine.shift
        return affine

    def tail(self, frames: int) -> Convolved:
        """The last frames alone: the two before them are in the source, and no past is needed."""
        part = copy(self)
        part.source = self.source.tail(frames + 2)
        part.affine = self.affine and self.affine.tail(frames + 2, self.shape[2])
        part.lead, part.past, part.keeps = 2, None, False
        part.shape = torch.Size((*self.shape[:2], frames, *self.shape[3:]))
        return part

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.of(self.source, lo, hi)

    def of(self, source: Callable[[int, int], Tensor], lo: int, hi: int) -> Tensor:
        """The rows, computed from those of a source that holds the same."""
        B, C, _, H, W = self.source.shape
        T = self.shape[2]
        above, below = min(lo, 1), min(H - hi, 1)  # rows of the source beyond the strip; at its edges a border
        x = source(lo - above, hi + below)
        padded = like(x, (B, C, T + 2, hi - lo + 2, W + 2))
        inner = padded[:, :, :, 1 - above : padded.shape[3] - 1 + below, 1:-1]
        now = inner[:, :, 2 - self.lead :]
        if self.affine:
            self.affine.write(x, lo - above, hi + below, out=now)
            F.silu(now, inplace=True)
        else:
            now.copy_(x)
        if not self.lead:
            inner[:, :, :2] = now[:, :, :1] if self.past is None else self.past(lo - above, hi + below)
        if self.keeps:
            self.future = self.future or Held(like(padded, (B, C, 2, H, W)))
            self.future.x[:, :, :, lo:hi] = padded[:, :, T:, 1:-1, 1:-1]
        fill_border(padded, self.conv.padding, (True, True, not above, not below))
        return conv3d(padded, self.conv.conv.weight, self.conv.conv.bias)

    def close(self) -> None:
        """All rows have been computed: what must be seen again goes to the memory."""
        if self.future is not None:
            self.segment.memory.pasts[self.conv.name] = self.future


class Summed:
    """A block's output on demand, from its second convolution; what both branches read is computed once for both."""

    def __init__(self, outer: Convolved, block: ResnetBlock):
        assert isinstance(outer.source, Convolved)
        self.outer, self.inner, self.source = outer, outer.source, outer.source.source
        self.block, self.shape = block, outer.shape
        B, C, T, _, W = self.shape
        self.row_bytes = B * C * T * W * outer.segment.element_size

    def tail(self, frames: int) -> Summed:
        """The last frames alone."""
        return Summed(self.outer.tail(frames), self.block)

    def __call__(self, lo: int, hi: int) -> Tensor:
        top, bottom = max(lo - 2, 0), min(hi + 2, self.shape[3])
        x = self.source(top, bottom)

        def source(lo: int, hi: int) -> Tensor:
            return x[:, :, :, lo - top : hi - top]

        y = self.outer.of(partial(self.inner.of, source), lo, hi)
        y += self.block.shortcut(source(lo, hi)[:, :, -y.shape[2] :])
        return y


class Activated:
    """Frames of an earlier segment, normalised as they were then; computed on demand."""

    def __init__(self, source: Rows, affine: Affine):
        self.source, self.affine = source, affine

    def __call__(self, lo: int, hi: int) -> Tensor:
        x = self.source(lo, hi)
        y = torch.empty_like(x)
        self.affine.write(x, lo, hi, out=y)
        return F.silu(y, inplace=True)


class Upsampled:
    """An upsampler's output, rows and columns doubled on demand; frames are doubled at once, where images are small.

    Args:
        reach: the most frames that a tail of it has.
    """

    def __init__(self, segment: Segment, source: Rows, upsample: Upsample, reach: int):
        self.upsample, self.weights, self.reach = upsample, upsample.folded(), reach
        x = source(0, source.shape[3])
        if "time_0" in self.weights:
            x = upsample.double_time(x, segment.memory.cache, self.weights)
            if segment.last:
                segment.memory.cache.pop(upsample.name)
        self.x = x
        self.last: Tensor | None = None
        B, C, T, H, W = x.shape
        self.shape = torch.Size((B, C, T, 2 * H, 2 * W))
        self.row_bytes = 3 * B * C * T * W * segment.element_size  # the row itself, and half of it on the way

    def tail(self, frames: int) -> Upsampled:
        """The last frames alone, in memory that all tails share."""
        if self.last is None:
            self.last = self.x[:, :, -self.reach :].clone()
        part = copy(self)
        part.x = self.last[:, :, -frames:]
        B, C, _, H, W = self.shape
        part.shape = torch.Size((B, C, frames, H, W))
        return part

    def __call__(self, lo: int, hi: int) -> Tensor:
        first, end = lo // 2, -(-hi // 2)
        above, below = min(first, 1), min(self.x.shape[3] - end, 1)
        x = self.x[:, :, :, first - above : end + below]
        y = self.upsample.double_space(x, self.weights, border=(not above, not below))
        return y[:, :, :, lo - 2 * first : hi - 2 * first]


def resnet(segment: Segment, source: Rows, block: ResnetBlock) -> Held:
    """A block's output, in the place of its inner feature map."""
    execution = segment.execution
    inner: Rows
    inner = first = Convolved(segment, source, block.conv1, block.norm1, again=isinstance(source, Upsampled))
    if execution.recompute < 2:
        inner = segment.hold(inner)
    outer = Convolved(segment, inner, block.conv2, block.norm2)
    into = next((m for m in (inner, source) if isinstance(m, Held) and m.shape == outer.shape), None)
    y = segment.hold(outer, into, add=lambda lo, hi: block.shortcut(source(lo, hi)))
    first.close()
    outer.close()
    return y


def halve(segment: Segment, source: Rows, layer: Downsample) -> Held:
    """Half the rows and columns, and the frames where the layer says so, by strips."""
    w, cache = layer.folded(), segment.memory.cache
    B, _, T, H, W = source.shape
    past = cache.pop(layer.name, None)
    future: list[Tensor] = []
    y = None
    row_bytes = max(source.row_bytes, B * source.shape[1] * T * W * segment.element_size)
    for lo, hi in even_strips(H // 2, segment.execution.strip_bytes // (2 * row_bytes)):
        above = min(lo, 1)
        part = layer.halve_space(source(2 * lo - above, 2 * hi), w, border=not above)
        if hasattr(layer, "temporal_conv"):
            strip = {} if past is None else {layer.name: past[:, :, :, lo:hi]}
            part = layer.halve_time(part, strip, w)
            future.append(strip.pop(layer.name))
        y = like(part, (*part.shape[:3], H // 2, W // 2)) if y is None else y
        y[:, :, :, lo:hi] = part
        del part  # before the next one is made
    if future and not segment.last:
        cache[layer.name] = torch.cat(future, dim=3)
    assert y is not None
    return Held(y)


def arranged(x_BCTHW: Tensor) -> Tensor:
    """In the memory format that is fastest for all that is made from it."""
    cpu = x_BCTHW.device.type == "cpu"
    return x_BCTHW.contiguous(memory_format=torch.channels_last_3d) if cpu else x_BCTHW


def compute_segment(
    coder: Encoder | Decoder, x_BCTHW: Tensor, memory: Memory, first: bool, last: bool, execution: Execution
) -> Tensor:
    """What `coder(x, cache)` gives: pixels → moments [B, 2c, t, h, w], or latents → pixels; x as `arranged`."""
    decode = isinstance(coder, Decoder)
    segment = Segment(execution, memory, first, last, x_BCTHW.element_size(), x_BCTHW if decode else None)
    # what pixels are computed again from, if any is, outlives the segment
    source = Held(x_BCTHW, PAST + tail_frames(len(coder.full_resolution())))
    start = Convolved(segment, source, coder.conv_in, None)
    h = run(segment, segment.hold(start) if decode else start, coder)
    start.close()
    y = finish(segment, h, coder)
    memory.segments += 1
    return y


def run(segment: Segment, h: Rows, coder: Encoder | Decoder) -> Rows:
    """All stages of a coder."""
    lazy = coder.full_resolution() if segment.execution.recompute > 2 else ()
    stages = list(coder.stages())
    for i, stage in enumerate(stages):
        if stage in lazy:
            inner = Convolved(segment, h, stage.conv1, stage.norm1, again=True)
            h = Summed(Convolved(segment, inner, stage.conv2, stage.norm2, again=True), stage)
        elif isinstance(stage, ResnetBlock):
            h = resnet(segment, h, stage)
        elif isinstance(stage, Downsample):
            h = halve(segment, h, stage)
        elif isinstance(stage, Upsample):
            h = Upsampled(segment, h, stage, reach=tail_frames(len(lazy)) if stages[i + 1] in lazy else 2)
            h = h if segment.execution.recompute else segment.hold(h)
    return h


def tail_frames(blocks: int) -> int:
    """How many frames the next segment must see again, to compute so many blocks and the past of one convolution."""
    return 2 + 4 * blocks


def finish(segment: Segment, h: Rows, coder: Encoder | Decoder) -> Tensor:
    """The last norm and convolution."""
    out = Convolved(segment, h, coder.conv_out, coder.norm_out, again=isinstance(h, Summed | Upsampled))
    x = segment.hold(out).x
    out.close()
    return x
