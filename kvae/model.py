"""KVAE-3D: a causal video autoencoder, run in segments of 17, 16, 16 … frames.

    kvae = KVAE(FAMILY["1.0"])
    z = kvae.encode(video)      # [B, 3, T, H, W] in −1..1  →  [B, 16, t, H/8, W/8],  T = 4(t − 1) + 1
    video = kvae.decode(z)

    for frames in kvae.decode_stream(z):        # one segment at a time: memory does not grow with the length
        write(frames)
    for posterior in kvae.encode_stream(read_frames()):
        ...

    # B batch, T frames, t latent frames, H/W pixels, h/w latent rows and columns
    x_B3THW, z_Bcthw

Source of the method: https://github.com/kandinskylab/kvae.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coders import Coder, Decoder, Encoder
from .config import SEGMENT_FRAMES, KVAEConfig
from .engine.strips import Execution, Memory, Norms, arranged, compute_segment, tail_frames
from .engine.tiles import Part, Span, Tiling, blended_tiling, exact_tiling
from .frames import padded, padded_frames, pieces_of, regroup, with_last
from .layers import name_streamed, wide
from .resample import Resampler

DEFAULT = Execution()
Progress = Callable[[int], None]  # called with the number of frames done so far; may raise, to cancel


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents: `mean` and `logvar`, both [B, c, t, h, w], raw."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, [B, c, t, h, w]. The log-variance is clamped to −30..20, as in diffusers."""
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + noise * (0.5 * self.logvar.clamp(-30, 20)).exp()


class KVAE(nn.Module):
    """A KVAE-3D. Pixels are x/128 − 1 for x in 0..255 (see `kvae.pixels`); latents are raw, in any float dtype."""

    def __init__(self, config: KVAEConfig | None = None):
        super().__init__()
        self.config = config or KVAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        name_streamed(self)

    def fold(self) -> KVAE:
        """Fold the resamplers' weights now rather than in the first run; `load_kvae` has done it."""
        self.encoder.fold()
        self.decoder.fold()
        return self

    def unfold(self) -> KVAE:
        """Forget the folded weights: after a change that autograd was not told of, through `.data`."""
        for module in self.modules():
            if isinstance(module, Resampler):
                module.unfold()
        return self

    def encode_stream(
        self,
        frames: Tensor | Iterable[Tensor],
        execution: Execution = DEFAULT,
        progress: Progress | None = None,
        norms: Norms | None = None,
    ) -> Iterator[Posterior]:
        """The posterior of each segment in turn.

        Args:
            frames: [B, 3, T, H, W] in −1..1, any T ≥ 1, H and W; or an iterable of such chunks, cut anywhere in time,
                of which two segments are held, copied: a reader may fill one buffer again and again. The last frame,
                row and column are repeated up to 4n + 1 frames and whole latents.
            norms: for tiles of a picture, see `Norms`; an empty one is filled. Not with gradients.

        Raises:
            ValueError: the execution or the shape is not one the model takes, or there are no frames.
        """
        self._check_execution(execution)
        lengths = execution.segment + 1, execution.segment
        if isinstance(frames, Tensor):
            pieces = pieces_of(_checked(frames, 3, "video"), *lengths)
        else:
            pieces = regroup((_checked(chunk, 3, "video") for chunk in frames), *lengths)
        return self._encoded(pieces, Memory(norms=norms), execution, progress)

    def _encoded(
        self, pieces: Iterator[Tensor], memory: Memory, execution: Execution, progress: Progress | None
    ) -> Iterator[Posterior]:
        self.encoder.fold()
        done = 0
        for x, last in with_last(pieces):
            moments = self._compute(self.encoder, x, memory, not done, last, execution)
            done += x.shape[2]
            yield Posterior(*moments.chunk(2, dim=1))
            if progress:
                progress(done)
        if not done:
            raise ValueError("there are no frames to encode; expected at least one")

    def decode_stream(
        self,
        z_Bcthw: Tensor,
        execution: Execution = DEFAULT,
        progress: Progress | None = None,
        norms: Norms | None = None,
    ) -> Iterator[Tensor]:
        """The frames of each segment in turn, [B, 3, 17 or 16, H, W], for latents [B, c, t, h, w].

        Args:
            norms: for tiles of a picture, see `Norms`; an empty one is filled. Not with gradients.

        Raises:
            ValueError: the execution or the shape is not one the model takes.
        """
        self._check_execution(execution)
        length = execution.segment // self._cadence
        pieces = pieces_of(_checked(z_Bcthw, self.config.z_channels, "latent"), length + 1, length)
        return self._decoded(pieces, Memory(norms=norms), execution, progress)

    def _decoded(
        self, pieces: Iterator[Tensor], memory: Memory, execution: Execution, progress: Progress | None
    ) -> Iterator[Tensor]:
        self.decoder.fold()
        done = 0
        for z, last in with_last(pieces):
            frames = self._compute(self.decoder, z, memory, not done, last, execution)
            done += frames.shape[2]
            yield frames
            del frames  # before the next ones are made
            if progress:
                progress(done)

    def posterior(self, x_B3THW: Tensor, execution: Execution = DEFAULT, progress: Progress | None = None) -> Posterior:
        """[B, 3, T, H, W] in −1..1 → the posterior of the latents, [B, c, t, h, w]; see `encode_stream`."""
        parts = list(self.encode_stream(x_B3THW, execution, progress))
        return Posterior(torch.cat([p.mean for p in parts], 2), torch.cat([p.logvar for p in parts], 2))

    def encode(self, x_B3THW: Tensor, execution: Execution = DEFAULT, progress: Progress | None = None) -> Tensor:
        """The latent of a video: its posterior's mean, [B, c, t, h, w], raw."""
        if execution.tiles == (1, 1):
            return torch.cat([posterior.mean for posterior in self.encode_stream(x_B3THW, execution, progress)], dim=2)
        _checked(x_B3THW, 3, "video")
        B, _, T, H, W = x_B3THW.shape
        side, t = self.config.spatial_factor, (padded_frames(T, self._cadence) - 1) // self._cadence + 1
        z = self._like.new_zeros(B, self.config.z_channels, t, -(-H // side), -(-W // side))
        for part in self.encode_parts(x_B3THW, execution, progress):
            part.put(z)
        return z

    def decode(self, z_Bcthw: Tensor, execution: Execution = DEFAULT, progress: Progress | None = None) -> Tensor:
        """Raw latents [B, c, t, h, w] → video [B, 3, 4(t − 1) + 1, 8h, 8w], about −1..1, not clipped."""
        if execution.tiles == (1, 1):
            return torch.cat(list(self.decode_stream(z_Bcthw, execution, progress)), dim=2)
        B, _, t, h, w = _checked(z_Bcthw, self.config.z_channels, "latent").shape
        side = self.config.spatial_factor
        x = self._like.new_zeros(B, 3, self._cadence * (t - 1) + 1, side * h, side * w)
        for part in self.decode_parts(z_Bcthw, execution, progress):
            part.put(x)
        return x

    def encode_parts(self, x_B3THW: Tensor, execution: Execution, progress: Progress | None = None) -> Iterator[Part]:
        """What `encode` puts together, as it comes: the segments of each tile in turn."""
        _, _, T, H, W = _checked(x_B3THW, 3, "video").shape
        side = self.config.spatial_factor
        tiling = self._tiling(execution, -(-H // side), -(-W // side), decode=False)
        each, norms = self._each(execution), None
        report = _over_tiles(progress, len(tiling), T)
        if shrink := self._shrink(tiling):
            norms = Norms()
            chunks = (shrink(frame, side) for frame in x_B3THW.split(1, dim=2))
            deque(self.encode_stream(chunks, each, norms=norms), maxlen=0)

        def latents(rows: Span, columns: Span) -> Iterator[Tensor]:
            (top, bottom), (left, right) = ((lo * side, hi * side) for lo, hi in (rows, columns))
            x = x_B3THW[..., top:bottom, left:right]
            return (posterior.mean for posterior in self.encode_stream(x, each, report, norms))

        return tiling.parts(latents, scale=1)

    def decode_parts(self, z_Bcthw: Tensor, execution: Execution, progress: Progress | None = None) -> Iterator[Part]:
        """What `decode` puts together, as it comes: the segments of each tile in turn."""
        _, _, t, h, w = _checked(z_Bcthw, self.config.z_channels, "latent").shape
        tiling = self._tiling(execution, h, w, decode=True)
        each, norms = self._each(execution), None
        report = _over_tiles(progress, len(tiling), self._cadence * (t - 1) + 1)
        if shrink := self._shrink(tiling):
            norms = Norms()
            deque(self.decode_stream(shrink(z_Bcthw, 1), each, norms=norms), maxlen=0)

        def frames(rows: Span, columns: Span) -> Iterator[Tensor]:
            return self.decode_stream(z_Bcthw[..., slice(*rows), slice(*columns)], each, report, norms)

        return tiling.parts(frames, scale=self.config.spatial_factor)

    def _tiling(self, execution: Execution, h: int, w: int, decode: bool) -> Tiling:
        if execution.overlap is None:
            return exact_tiling(self.config, h, w, execution.tiles, decode)
        return blended_tiling(h, w, execution.tiles, execution.overlap)

    def _each(self, execution: Execution) -> Execution:
        """How to compute each of the tiles."""
        each = replace(execution, tiles=(1, 1), overlap=None)
        self._check_execution(each)
        return each

    def _shrink(self, tiling: Tiling) -> Callable[[Tensor, int], Tensor] | None:
        """For GroupNorm's statistics: how to make a picture, of so many rows a latent, no larger than a tile."""
        if self.config.per_position or len(tiling) == 1:
            return None
        sides = [axis.outer[-1][1] for axis in (tiling.rows, tiling.columns)]
        factor = max(n / tile for n, tile in zip(sides, tiling.largest, strict=True))
        small = [max(1, int(n / factor)) for n in sides]

        def shrink(x: Tensor, side: int) -> Tensor:
            return F.interpolate(wide(x), (x.shape[2], *(n * side for n in small)), mode="area").to(x.dtype)

        return shrink

    def _compute(
        self, coder: Encoder | Decoder, x: Tensor, memory: Memory, first: bool, last: bool, execution: Execution
    ) -> Tensor:
        """A segment: by the modules themselves where a gradient is wanted, else by strips."""
        if self._graded(coder, x):
            return coder(self._whole(coder, x.to(self._like), first), memory.cache)
        with torch.no_grad():
            x = self._whole(coder, arranged(x.to(self._like)), first)
            return compute_segment(coder, x, memory, first, last, execution)

    def _whole(self, coder: Encoder | Decoder, x: Tensor, first: bool) -> Tensor:
        """Pixels repeated up to whole latents: 4n + 1 frames at the start of a stream, 4n later on."""
        if coder is self.decoder:
            return x
        frames = padded_frames(x.shape[2] + 1 - first, self._cadence) - 1 + first
        return padded(x, frames, self.config.spatial_factor)

    @staticmethod
    def _graded(coder: Coder, x: Tensor) -> bool:
        """Whether the input, or any weight, wants a gradient."""
        wanted = x.requires_grad or any(parameter.requires_grad for parameter in coder.parameters())
        return torch.is_grad_enabled() and wanted

    @property
    def _like(self) -> Tensor:
        return self.decoder.conv_out.conv.weight

    @property
    def _cadence(self) -> int:
        return self.config.temporal_compress_times

    def _check_execution(self, execution: Execution) -> None:
        if execution.tiles != (1, 1):
            raise ValueError("a stream gives whole pictures, segment by segment: for tiles use encode or decode")
        frames = execution.segment
        if not self.config.per_position and frames != SEGMENT_FRAMES:
            raise ValueError(
                f"segments of {frames} frames; this model has GroupNorm over a segment of {SEGMENT_FRAMES} frames"
            )
        if frames < 1 or frames % self._cadence:
            raise ValueError(f"segments of {frames} frames; expected a multiple of {self._cadence}")
        if execution.recompute > 2 and frames < tail_frames(len(self.decoder.full_resolution())):
            raise ValueError(f"segments of {frames} frames are too short to compute again what they remember")


def _over_tiles(progress: Progress | None, tiles: int, frames: int) -> Progress:
    """For the streams of the tiles in turn: what is done of the whole."""
    before = 0

    def report(done: int) -> None:
        nonlocal before
        if progress:
            progress((before + done) // tiles)
        before += frames if done == frames else 0

    return report


def _checked(x: Tensor, channels: int, name: str) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; expected floating-point values")
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, {channels}, T, H, W]")
    return x
