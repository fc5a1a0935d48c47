"""KVAE-3D: a causal video autoencoder, run in segments of 17, 16, 16 … frames.

    kvae = KVAE(FAMILY["1.0"])
    z = kvae.encode(video)      # [B, 3, T, H, W] in −1..1  →  [B, 16, t, H/8, W/8],  T = 4(t − 1) + 1
    video = kvae.decode(z)

    for frames in kvae.decode_stream(z):        # one segment at a time: memory does not grow with the clip's length
        write(frames)
    for posterior in kvae.encode_stream(read_frames()):
        ...

    # B batch, T frames, t latent frames, H/W pixels, h/w latent rows and columns
    x_B3THW, z_Bcthw

Source of the model: https://github.com/kandinskylab/kvae.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from .coders import Coder, Decoder, Encoder
from .config import SEGMENT_FRAMES, KVAEConfig
from .engine.execution import Execution, Executions, Recompute, frames_to_recompute, present
from .engine.layout import fastest_format
from .engine.run_segment import run_segment
from .engine.stream_state import GroupNormStats, StreamState
from .engine.tiles import Part, Span, Tiling, blended_tiling, exact_tiling, shrink_to_tile
from .frames import padded, padded_frames, pieces_of, regroup, with_last
from .layers import name_streamed
from .posterior import Posterior
from .progress import Progress, progress_over_tiles
from .resample import Resampler

DEFAULT = Execution()


class KVAE(nn.Module):
    """A KVAE-3D. Pixels are x/128 − 1 for x in 0..255 (see `kvae.pixels`); latents are raw. Any float dtype works.

    In all methods, `execution` may also be a function that is asked before each segment. Its answers may differ in
    strips and in what is recomputed.
    """

    def __init__(self, config: KVAEConfig | None = None):
        super().__init__()
        self.config = config or KVAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        name_streamed(self)

    def fold(self) -> KVAE:
        """Fold the resamplers' weights now rather than in the first run. `load_kvae` does it."""
        self.encoder.fold()
        self.decoder.fold()
        return self

    def unfold(self) -> KVAE:
        """Drop the folded weights. Needed after a change that autograd does not see, such as `weight.data.mul_(2)`."""
        for module in self.modules():
            if isinstance(module, Resampler):
                module.unfold()
        return self

    def encode_stream(
        self,
        frames: Tensor | Iterable[Tensor],
        execution: Executions = DEFAULT,
        progress: Progress | None = None,
        norm_stats: GroupNormStats | None = None,
    ) -> Iterator[Posterior]:
        """Yield the posterior of each segment in turn.

        Args:
            frames: [B, 3, T, H, W] in −1..1, any T ≥ 1, H and W; or an iterable of such chunks, cut anywhere in time.
                Chunks are copied, so a reader may reuse its buffer; at most two segments are held. The last frame, row
                and column are repeated up to 4n + 1 frames and full latents.
            norm_stats: GroupNorm's statistics to record or reuse, for tiles of a picture (see `GroupNormStats`).
                Ignored with gradients.

        Raises:
            ValueError: the model does not support the execution or the shape, or there are no frames.
        """
        segment = self._checked_segment(execution)
        lengths = segment + 1, segment
        if isinstance(frames, Tensor):
            pieces = pieces_of(_checked(frames, 3, "video"), *lengths)
        else:
            pieces = regroup((_checked(chunk, 3, "video") for chunk in frames), *lengths)
        return self._encoded(pieces, StreamState(norm_stats=norm_stats), execution, progress)

    def _encoded(
        self, pieces: Iterator[Tensor], state: StreamState, execution: Executions, progress: Progress | None
    ) -> Iterator[Posterior]:
        self.encoder.fold()
        done = 0
        with closing(state):
            for x, last in with_last(pieces):
                moments = self._compute(self.encoder, x, state, not done, last, present(execution))
                done += x.shape[2]
                yield Posterior(*moments.chunk(2, dim=1))
                if progress:
                    progress(done)
        if not done:
            raise ValueError("there are no frames to encode; expected at least one")

    def decode_stream(
        self,
        z_Bcthw: Tensor | Iterable[Tensor],
        execution: Executions = DEFAULT,
        progress: Progress | None = None,
        norm_stats: GroupNormStats | None = None,
    ) -> Iterator[Tensor]:
        """Yield the frames of each segment in turn, [B, 3, T, H, W], from latents [B, c, t, h, w].

        T is 17, then 16, with the default execution; the last segment may be shorter.

        Args:
            z_Bcthw: the latents, or an iterable of chunks of them, cut anywhere in time. Chunks are copied; at most two
                segments are held.
            norm_stats: GroupNorm's statistics to record or reuse, for tiles of a picture (see `GroupNormStats`).
                Ignored with gradients.

        Raises:
            ValueError: the model does not support the execution or the shape.
        """
        length = self._checked_segment(execution) // self._temporal_factor
        lengths, channels = (length + 1, length), self.config.z_channels
        if isinstance(z_Bcthw, Tensor):
            pieces = pieces_of(_checked(z_Bcthw, channels, "latent"), *lengths)
        else:
            pieces = regroup((_checked(chunk, channels, "latent") for chunk in z_Bcthw), *lengths)
        return self._decoded(pieces, StreamState(norm_stats=norm_stats), execution, progress)

    def _decoded(
        self, pieces: Iterator[Tensor], state: StreamState, execution: Executions, progress: Progress | None
    ) -> Iterator[Tensor]:
        self.decoder.fold()
        done = 0
        with closing(state):
            for z, last in with_last(pieces):
                frames = self._compute(self.decoder, z, state, not done, last, present(execution))
                done += frames.shape[2]
                yield frames
                del frames  # before the next ones are made
                if progress:
                    progress(done)
        if not done:
            raise ValueError("there are no latents to decode; expected at least one frame of them")

    def posterior(
        self, x_B3THW: Tensor, execution: Executions = DEFAULT, progress: Progress | None = None
    ) -> Posterior:
        """Encode a video [B, 3, T, H, W] in −1..1 to the posterior of its latents, [B, c, t, h, w].

        See `encode_stream` for sizes and errors; tiles are not supported.
        """
        parts = list(self.encode_stream(x_B3THW, execution, progress))
        return Posterior(torch.cat([p.mean for p in parts], 2), torch.cat([p.logvar for p in parts], 2))

    def encode(self, x_B3THW: Tensor, execution: Executions = DEFAULT, progress: Progress | None = None) -> Tensor:
        """Encode a video [B, 3, T, H, W] in −1..1 to its raw latent [B, c, t, h, w], the mean of the posterior.

        Raises:
            ValueError: as `encode_stream`.
        """
        if present(execution).tiles == (1, 1):
            return torch.cat([posterior.mean for posterior in self.encode_stream(x_B3THW, execution, progress)], dim=2)
        _checked(x_B3THW, 3, "video")
        B, _, T, H, W = x_B3THW.shape
        side, t = self.config.spatial_factor, (padded_frames(T, self._temporal_factor) - 1) // self._temporal_factor + 1
        z = self._weight.new_zeros(B, self.config.z_channels, t, -(-H // side), -(-W // side))
        for part in self.encode_parts(x_B3THW, execution, progress):
            part.put(z)
        return z

    def decode(self, z_Bcthw: Tensor, execution: Executions = DEFAULT, progress: Progress | None = None) -> Tensor:
        """Decode raw latents [B, c, t, h, w] to a video [B, 3, 4(t − 1) + 1, 8h, 8w], about −1..1, not clipped.

        2.0-t4s16 has 16h and 16w.

        Raises:
            ValueError: as `decode_stream`.
        """
        if present(execution).tiles == (1, 1):
            return torch.cat(list(self.decode_stream(z_Bcthw, execution, progress)), dim=2)
        B, _, t, h, w = _checked(z_Bcthw, self.config.z_channels, "latent").shape
        side = self.config.spatial_factor
        x = self._weight.new_zeros(B, 3, self._temporal_factor * (t - 1) + 1, side * h, side * w)
        for part in self.decode_parts(z_Bcthw, execution, progress):
            part.put(x)
        return x

    def encode_parts(self, x_B3THW: Tensor, execution: Executions, progress: Progress | None = None) -> Iterator[Part]:
        """Yield the parts that `encode` assembles: the segments of each tile in turn, as they are computed.

        Raises:
            ValueError: as `encode`.
        """
        _, _, T, H, W = _checked(x_B3THW, 3, "video").shape
        side = self.config.spatial_factor
        tiling = self._tiling(present(execution), -(-H // side), -(-W // side), decode=False)
        each, stats = self._of_one_tile(execution), None
        report = progress_over_tiles(progress, len(tiling), T)
        if self._needs_statistics(tiling):
            stats = GroupNormStats()
            chunks = (shrink_to_tile(frame, tiling, side) for frame in x_B3THW.split(1, dim=2))
            deque(self.encode_stream(chunks, each, norm_stats=stats), maxlen=0)

        def latents(rows: Span, columns: Span) -> Iterator[Tensor]:
            (top, bottom), (left, right) = ((lo * side, hi * side) for lo, hi in (rows, columns))
            x = x_B3THW[..., top:bottom, left:right]
            return (posterior.mean for posterior in self.encode_stream(x, each, report, stats))

        return tiling.parts(latents, scale=1)

    def decode_parts(self, z_Bcthw: Tensor, execution: Executions, progress: Progress | None = None) -> Iterator[Part]:
        """Yield the parts that `decode` assembles: the segments of each tile in turn, as they are computed.

        Raises:
            ValueError: as `decode`.
        """
        _, _, t, h, w = _checked(z_Bcthw, self.config.z_channels, "latent").shape
        tiling = self._tiling(present(execution), h, w, decode=True)
        each, stats = self._of_one_tile(execution), None
        report = progress_over_tiles(progress, len(tiling), self._temporal_factor * (t - 1) + 1)
        if self._needs_statistics(tiling):
            stats = GroupNormStats()
            deque(self.decode_stream(shrink_to_tile(z_Bcthw, tiling, 1), each, norm_stats=stats), maxlen=0)

        def frames(rows: Span, columns: Span) -> Iterator[Tensor]:
            return self.decode_stream(z_Bcthw[..., slice(*rows), slice(*columns)], each, report, stats)

        return tiling.parts(frames, scale=self.config.spatial_factor)

    def _tiling(self, execution: Execution, h: int, w: int, decode: bool) -> Tiling:
        if execution.overlap is None:
            return exact_tiling(self.config, h, w, execution.tiles, decode)
        return blended_tiling(h, w, execution.tiles, execution.overlap)

    def _of_one_tile(self, execution: Executions) -> Executions:
        """The execution for the stream of a single tile."""
        now = present(execution)
        each = execution if now.tiles == (1, 1) and now.overlap is None else replace(now, tiles=(1, 1), overlap=None)
        self._checked_segment(each)
        return each

    def _needs_statistics(self, tiling: Tiling) -> bool:
        """Whether tiles must share GroupNorm's statistics, gathered from a smaller copy of the whole picture."""
        return not self.config.norm_is_per_position and len(tiling) > 1

    def _compute(
        self, coder: Encoder | Decoder, x: Tensor, state: StreamState, first: bool, last: bool, execution: Execution
    ) -> Tensor:
        """Compute a segment: by the modules' own `forward` if a gradient is needed, else by strips."""
        if self._needs_gradient(coder, x):
            return coder(self._pad(coder, x.to(self._weight), first), state.cache)
        with torch.no_grad():
            x = self._pad(coder, x.to(self._weight), first)
            x = x.contiguous(memory_format=fastest_format(x.device))
            return run_segment(coder, x, state, first, last, execution)

    def _pad(self, coder: Encoder | Decoder, x: Tensor, first: bool) -> Tensor:
        """Repeat pixels up to full latents: 4n + 1 frames at the start of a stream, 4n later. Latents need none."""
        if coder is self.decoder:
            return x
        frames = padded_frames(x.shape[2] + 1 - first, self._temporal_factor) - 1 + first
        return padded(x, frames, self.config.spatial_factor)

    @staticmethod
    def _needs_gradient(coder: Coder, x: Tensor) -> bool:
        """Whether the input, or any weight, requires a gradient."""
        required = x.requires_grad or any(parameter.requires_grad for parameter in coder.parameters())
        return torch.is_grad_enabled() and required

    @property
    def _weight(self) -> Tensor:
        """Any weight: of the model's dtype and device."""
        return self.decoder.conv_out.conv.weight

    @property
    def _temporal_factor(self) -> int:
        """Frames per latent."""
        return self.config.temporal_compress_times

    def _checked_segment(self, execution: Executions) -> int:
        """The frames of a segment, of an execution that this model supports."""
        now = present(execution)
        if now.tiles != (1, 1):
            raise ValueError("a stream yields whole pictures, segment by segment; use encode or decode for tiles")
        frames = now.segment
        if not self.config.norm_is_per_position and frames != SEGMENT_FRAMES:
            raise ValueError(
                f"segments of {frames} frames; this model has GroupNorm over a segment of {SEGMENT_FRAMES} frames"
            )
        if frames < 1 or frames % self._temporal_factor:
            raise ValueError(f"segments of {frames} frames; expected a multiple of {self._temporal_factor}")
        needed = frames_to_recompute(len(self.decoder.full_resolution()))
        if now.recompute == Recompute.FULL_RESOLUTION and frames < needed:
            raise ValueError(
                f"segments of {frames} frames; recomputing all maps of full resolution needs {needed} or more"
            )
        return frames


def _checked(x: Tensor, channels: int, name: str) -> Tensor:
    """x, checked.

    Raises:
        ValueError: x is not a float tensor [B, channels, T, H, W] with at least one value.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; expected floating-point values")
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, {channels}, T, H, W]")
    return x
