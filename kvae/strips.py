"""A segment computed for its result alone: the numbers of the modules' own `forward`, in less memory and time.

Every layer runs by strips of rows. A 3x3 window needs one row beyond its strip, and the statistics of a GroupNorm are
gathered over all strips before the first is normalised, so strips are exact. A feature map is something that is asked
for by rows (`Rows`): one held in memory, or one computed on demand from another. What a convolution reads is
normalised straight into its padded input, and a block's output takes the place of its inner feature map.

    # B batch, C channels, T frames, H/W rows and columns, lo:hi rows
    # x_BCTHW, z_Bcthw (the latent that conditions the decoder's norms)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coders import Decoder, Encoder
from .config import SEGMENT_FRAMES
from .layers import Cache, CausalConv3d, ResnetBlock, RMSNorm, SpatialNorm
from .resample import Downsample, Upsample, like

STATISTICS_BYTES = 32 << 20  # of the float32 copy that GroupNorm's statistics are gathered from
BATCH_NORM_DEVICES = ("cpu", "cuda")  # those with torch.batch_norm_update_stats
MIN_ROWS = 2  # so that the strip before is all that the next one's window can reach


@dataclass(frozen=True)
class Method:
    """How to compute a clip; the result is the same.

    Attributes:
        segment: frames in a segment, after the first one. Models with GroupNorm are defined by 16.
        strip_bytes: about the size of a convolution's input and output, per strip.
        recompute: 0 holds every feature map; 1 computes upsampled ones again wherever they are read; 2 also the inner
            ones of the blocks.
        tiles: rows and columns of tiles, each computed for the whole clip before the next (see `kvae.tiles`). Only
            where no norm runs over the picture, and not in streams.
    """

    segment: int = SEGMENT_FRAMES
    strip_bytes: int = 256 << 20
    recompute: int = 0
    tiles: tuple[int, int] = (1, 1)


class Rows(Protocol):
    """A feature map that is asked for by rows."""

    shape: torch.Size  # [B, C, T, H, W]
    row_bytes: int  # in use while one row is computed

    def __call__(self, lo: int, hi: int) -> Tensor:
        """[B, C, T, hi − lo, W]."""


class Held:
    """A feature map in memory."""

    def __init__(self, x_BCTHW: Tensor):
        self.x, self.shape, self.row_bytes = x_BCTHW, x_BCTHW.shape, 0

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.x[:, :, :, lo:hi]


@dataclass
class Memory:
    """What a stream remembers from segment to segment: `pasts`, the two frames before the next one that each
    convolution reads, and `cache`, that of the resamplers."""

    pasts: dict[str, Rows] = field(default_factory=dict)
    cache: Cache = field(default_factory=dict)


@dataclass
class Segment:
    """One segment on its way through a coder.

    Attributes:
        memory: of the stream; written too, unless this is the `last` segment.
        z_Bcthw: conditions the norms, in the decoder.
    """

    method: Method
    memory: Memory
    first: bool
    last: bool
    element_size: int  # bytes
    z_Bcthw: Tensor | None = None

    def strips(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """Bounds of strips of about the method's size."""
        yield from even_strips(rows.shape[3], self.method.strip_bytes // max(1, rows.row_bytes))

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


def even_strips(height: int, most: int) -> Iterator[tuple[int, int]]:
    """Bounds of the fewest strips of nearly equal height, at most `most` rows each where MIN_ROWS allows."""
    count = -(-height // max(MIN_ROWS, most))
    count = max(1, min(count, height // MIN_ROWS))
    bounds = [height * i // count for i in range(count + 1)]
    yield from pairwise(bounds)


class Affine:
    """A norm as scale and shift: those of GroupNorm from its statistics, those of the latent on top of it."""

    def __init__(self, segment: Segment, norm: nn.Module, source: Rows):
        self.height = source.shape[3]
        self.z, self.first = segment.z_Bcthw, segment.first
        self.spatial = norm if isinstance(norm, SpatialNorm) else None
        inner = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
        self.rms = isinstance(inner, RMSNorm)
        if isinstance(inner, RMSNorm):
            self.scale, self.shift = inner.gamma[None].float() * len(inner.gamma) ** 0.5, None
        else:
            self.scale, self.shift = group_affine(inner, source)  # type: ignore[arg-type]

    def tail(self, frames: int, T: int) -> Affine:
        """The same for the last frames alone, of T."""
        part = copy(self)
        if self.z is not None:
            t, first = self.z.shape[2], int(self.first)
            rate = (T - first) // (t - first)
            latents = (frames + rate - 1) // rate
            part.z, part.first = self.z[:, :, t - latents :], False
        return part

    def write(self, x_BCTHW: Tensor, lo: int, hi: int, out: Tensor) -> None:
        """out = norm(x), for rows lo:hi of the source."""
        if self.rms:
            x_BCTHW = torch.div(x_BCTHW, x_BCTHW.norm(dim=1, keepdim=True).clamp_min_(1e-12), out=out)
        if self.spatial is None:
            self._apply(x_BCTHW, self.scale, self.shift, out)
            return
        z = self.z
        assert z is not None
        rate = self.height // z.shape[3]
        z = z[:, :, :, lo // rate : (hi - 1) // rate + 1]
        scale, shift = self.spatial.conv_y(z), self.spatial.conv_b(z)
        shift = shift if self.shift is None else scale * self.shift + shift
        rows = torch.arange(lo, hi, device=z.device) // rate - lo // rate
        scale, shift = ((s.to(x_BCTHW.dtype)[:, :, :, rows]) for s in (scale * self.scale, shift))
        # the stream's first latent is one frame
        head = 1 if self.first and x_BCTHW.shape[2] > 1 else 0
        for frames, latents in ((slice(0, head), slice(0, head)), (slice(head, None), slice(head, None))):
            if x_BCTHW[:, :, frames].shape[2]:
                part = scale[:, :, latents], shift[:, :, latents]
                self._apply_blocks(x_BCTHW[:, :, frames], *part, out[:, :, frames])

    @staticmethod
    def _apply(x_BCTHW: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> None:
        if shift is None:
            torch.mul(x_BCTHW, scale.to(x_BCTHW.dtype), out=out)
        else:
            torch.addcmul(shift.to(x_BCTHW.dtype), x_BCTHW, scale.to(x_BCTHW.dtype), out=out)

    @staticmethod
    def _apply_blocks(x_BCTHW: Tensor, scale_BCtHw: Tensor, shift_BCtHw: Tensor, out: Tensor) -> None:
        t, w = scale_BCtHw.shape[2], scale_BCtHw.shape[4]
        x, y = (m.unflatten(4, (w, -1)).unflatten(2, (t, -1)) for m in (x_BCTHW, out))
        torch.addcmul(shift_BCtHw[:, :, :, None, :, :, None], x, scale_BCtHw[:, :, :, None, :, :, None], out=y)


def group_affine(norm: nn.GroupNorm, source: Rows) -> tuple[Tensor, Tensor]:
    """GroupNorm over a whole feature map, as scale and shift [B, C, 1, 1, 1] in float32."""
    B, C, T, H, W = source.shape
    bounds = list(even_strips(H, STATISTICS_BYTES // (B * C * T * W * 4)))
    if isinstance(source, Held) and source.x.device.type in BATCH_NORM_DEVICES:
        bounds = [(0, H)]  # nothing is copied
    moments = [channel_moments(source(lo, hi)) for lo, hi in bounds]
    # [strips, B, groups, channels of a group]; a group's variance is that within its parts plus that between them
    means, variances = (torch.stack(m).unflatten(2, (norm.num_groups, -1)) for m in zip(*moments, strict=True))
    share = means.new_tensor([(hi - lo) / H for lo, hi in bounds])[:, None, None, None]
    mean = (share * means).sum(0).mean(-1, keepdim=True)
    variance = (share * (variances + (means - mean).square())).sum(0).mean(-1, keepdim=True)
    scale = norm.weight.float().view(norm.num_groups, -1) * (variance + norm.eps).rsqrt()
    shift = norm.bias.float().view(norm.num_groups, -1) - mean * scale
    return scale.flatten(1)[..., None, None, None], shift.flatten(1)[..., None, None, None]


def channel_moments(x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of each clip, [B, C] in float32."""
    if x_BCTHW.device.type not in BATCH_NORM_DEVICES:
        variance, mean = torch.var_mean(x_BCTHW.float(), dim=(2, 3, 4), correction=0)
        return mean, variance
    # 3 to 30 times as fast as var_mean on a CPU; running statistics in float32 make it accumulate so
    dtype = torch.promote_types(x_BCTHW.dtype, torch.float32)
    unused = torch.zeros(x_BCTHW.shape[1], dtype=dtype, device=x_BCTHW.device)
    moments = [torch.batch_norm_update_stats(clip[None], unused, unused, 0.0) for clip in x_BCTHW]
    mean, variance = (torch.stack(m) for m in zip(*moments, strict=True))
    return mean, variance


class Convolved:
    """A causal convolution of the activations of another feature map (or of the map itself, without a norm)."""

    def __init__(self, segment: Segment, source: Rows, conv: CausalConv3d, norm: nn.Module | None):
        B, _, T, H, W = source.shape
        self.shape = torch.Size((B, conv.conv.out_channels, T, H, W))
        self.segment, self.source, self.conv = segment, source, conv
        self.affine = Affine(segment, norm, source) if norm else None
        element = segment.element_size
        self.row_bytes = source.row_bytes + B * (source.shape[1] + self.shape[1]) * (T + 2) * (W + 2) * element
        self.past: Rows | None = segment.memory.pasts.pop(conv.name, None)
        self.future: Rows | None = None
        if not segment.last:
            self.future = self._remember()

    def __call__(self, lo: int, hi: int) -> Tensor:
        B, C, T, H, W = self.source.shape
        above, below = min(lo, 1), min(H - hi, 1)  # rows of the source beyond the strip; at its edges a border
        x = self.source(lo - above, hi + below)
        padded = like(x, (B, C, T + 2, hi - lo + 2, W + 2))
        inner = padded[:, :, :, 1 - above : padded.shape[3] - 1 + below, 1:-1]
        now = inner[:, :, 2:]
        if self.affine:
            self.affine.write(x, lo - above, hi + below, out=now)
            F.silu(now, inplace=True)
        else:
            now.copy_(x)
        inner[:, :, :2] = now[:, :, :1] if self.past is None else self.past(lo - above, hi + below)
        if isinstance(self.future, Held):
            self.future.x[:, :, :, lo:hi] = padded[:, :, T:, 1:-1, 1:-1]
        fill_border(padded, self.conv.padding, top=not above, bottom=not below)
        return self.conv.conv(padded)

    def _remember(self) -> Rows:
        """The last two frames of what the convolution reads: to be filled, or to be computed again."""
        B, C, T, H, W = self.source.shape
        if isinstance(self.source, Upsampled) and self.affine and T > 1:
            return Activated(self.source.tail(2), self.affine.tail(2, T))
        return Held(like(self.source(0, 1), (B, C, 2, H, W)))

    def close(self) -> None:
        """All rows have been computed: what must be seen again goes to the cache."""
        if self.future is not None:
            self.segment.memory.pasts[self.conv.name] = self.future


class Activated:
    """Frames of an earlier segment, normalised as they were then; computed on demand."""

    def __init__(self, source: Rows, affine: Affine):
        self.source, self.affine = source, affine
        self.shape, self.row_bytes = source.shape, source.row_bytes

    def __call__(self, lo: int, hi: int) -> Tensor:
        x = self.source(lo, hi)
        y = torch.empty_like(x)
        self.affine.write(x, lo, hi, out=y)
        return F.silu(y, inplace=True)


def fill_border(x_BCTHW: Tensor, padding: str, top: bool, bottom: bool) -> None:
    """Columns at both sides, and rows where they are the image's own."""
    for dim, edge, inside, needed in ((4, 0, 1, True), (4, -1, -2, True), (3, 0, 1, top), (3, -1, -2, bottom)):
        if needed and padding == "replicate":
            x_BCTHW.select(dim, edge).copy_(x_BCTHW.select(dim, inside))
        elif needed:
            x_BCTHW.select(dim, edge).zero_()


class Upsampled:
    """An upsampler's output, rows and columns doubled on demand; frames are doubled at once, where images are small."""

    def __init__(self, segment: Segment, source: Rows, upsample: Upsample):
        self.upsample, self.weights = upsample, upsample.folded()
        x = source(0, source.shape[3])
        if "time_0" in self.weights:
            x = upsample.double_time(x, segment.memory.cache, self.weights)
            if segment.last:
                segment.memory.cache.pop(upsample.name)
        self.x = x
        B, C, T, H, W = x.shape
        self.shape = torch.Size((B, C, T, 2 * H, 2 * W))
        self.row_bytes = 2 * B * C * T * 2 * W * segment.element_size

    def tail(self, frames: int) -> Upsampled:
        """The last frames alone, in memory of their own."""
        part = copy(self)
        part.x = self.x[:, :, -frames:].clone()
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
    method = segment.method
    inner: Rows
    inner = first = Convolved(segment, source, block.conv1, block.norm1)
    if method.recompute < 2:
        inner = segment.hold(inner)
    outer = Convolved(segment, inner, block.conv2, block.norm2)
    into = next((m for m in (inner, source) if isinstance(m, Held) and m.shape == outer.shape), None)
    y = segment.hold(outer, into, add=lambda lo, hi: block.shortcut(source(lo, hi)))
    first.close()
    outer.close()
    return y


def halve_space(segment: Segment, source: Rows, layer: Downsample) -> Held:
    """Half the rows and columns, by strips."""
    w = layer.folded()
    B, _, T, H, W = source.shape
    y = None
    for lo, hi in even_strips(H // 2, segment.method.strip_bytes // (2 * source(0, 1).nbytes)):
        above = min(lo, 1)
        part = layer.halve_space(source(2 * lo - above, 2 * hi), w, border=not above)
        y = like(part, (B, part.shape[1], T, H // 2, W // 2)) if y is None else y
        y[:, :, :, lo:hi] = part
    assert y is not None
    return Held(y)


def halve_time(segment: Segment, source: Rows, layer: Downsample) -> Held:
    """Half the frames at once, where images are small."""
    y = layer.halve_time(source(0, source.shape[3]), segment.memory.cache, layer.folded())
    if segment.last:
        segment.memory.cache.pop(layer.name)
    return Held(y)


def encode_segment(
    encoder: Encoder, x_B3THW: Tensor, memory: Memory, first: bool, last: bool, method: Method
) -> Tensor:
    """What `encoder(x, cache)` gives: [B, 3, T, H, W] → [B, 2c, t, h, w]."""
    segment = Segment(method, memory, first, last, x_B3THW.element_size())
    start = Convolved(segment, Held(x_B3THW), encoder.conv_in, None)
    h = run(segment, start, encoder)
    start.close()
    return finish(segment, h, encoder)


def decode_segment(
    decoder: Decoder, z_Bcthw: Tensor, memory: Memory, first: bool, last: bool, method: Method
) -> Tensor:
    """What `decoder(z, cache)` gives: [B, c, t, h, w] → [B, 3, T, H, W]."""
    segment = Segment(method, memory, first, last, z_Bcthw.element_size(), z_Bcthw)
    start = Convolved(segment, Held(z_Bcthw), decoder.conv_in, None)
    h = run(segment, segment.hold(start), decoder)
    start.close()
    return finish(segment, h, decoder)


def run(segment: Segment, h: Rows, coder: Encoder | Decoder) -> Rows:
    """All stages of a coder."""
    for stage in coder.stages():
        if isinstance(stage, ResnetBlock):
            h = resnet(segment, h, stage)
        elif isinstance(stage, Downsample):
            h = halve_space(segment, h, stage)  # what it was computed from ends here, before more is made
            h = halve_time(segment, h, stage) if hasattr(stage, "temporal_conv") else h
        elif isinstance(stage, Upsample):
            h = Upsampled(segment, h, stage)
            h = h if segment.method.recompute else segment.hold(h)
    return h


def finish(segment: Segment, h: Rows, coder: Encoder | Decoder) -> Tensor:
    """The last norm and convolution."""
    out = Convolved(segment, h, coder.conv_out, coder.norm_out)
    x = segment.hold(out).x
    out.close()
    return x
