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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .coders import Decoder, Encoder
from .config import SEGMENT_FRAMES, KVAEConfig
from .frames import pad_frames, pad_sides, padded_frames, regroup, with_last
from .layers import name_streamed
from .resample import Resampler
from .strips import Memory, Method, Norms, compute_segment
from .tiles import tiles

DEFAULT = Method()
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
        self.register_load_state_dict_post_hook(_unfold)

    def fold(self) -> KVAE:
        """Fold the resamplers' weights, once and for all: for frozen weights; `load_kvae` has done it."""
        for module in self.modules():
            if isinstance(module, Resampler):
                module.fold()
        return self

    def unfold(self) -> KVAE:
        """Forget the folded weights: after the published ones have changed."""
        for module in self.modules():
            if isinstance(module, Resampler):
                module.unfold()
        return self

    def encode_stream(
        self,
        frames: Tensor | Iterable[Tensor],
        method: Method = DEFAULT,
        progress: Progress | None = None,
        norms: Norms | None = None,
    ) -> Iterator[Posterior]:
        """The posterior of each segment in turn.

        Args:
            frames: [B, 3, T, H, W] in −1..1, any T ≥ 1, H and W; or an iterable of such chunks, cut anywhere in time,
                of which little more than a segment is held. The last frame, row and column are repeated up to 4n + 1
                frames and whole latents.
            norms: for tiles of a picture, see `Norms`; an empty one is filled. Not with gradients.

        Raises:
            ValueError: the shape is not one the model takes, or there are no frames.
        """
        self._check_method(method)
        memory = Memory(norms=norms)
        done = 0
        chunks = [frames] if isinstance(frames, Tensor) else frames
        pieces = regroup((_checked(chunk, 3, "video") for chunk in chunks), method.segment + 1, method.segment)
        for x, last in with_last(pieces):
            whole = pad_frames(x.to(self._like), self._cadence, first=not done)
            whole = pad_sides(whole, self.config.spatial_factor)
            moments = self._compute(self.encoder, whole, memory, not done, last, method)
            done += x.shape[2]
            yield Posterior(*moments.chunk(2, dim=1))
            if progress:
                progress(done)
        if not done:
            raise ValueError("there are no frames to encode; expected at least one")

    def decode_stream(
        self,
        z_Bcthw: Tensor,
        method: Method = DEFAULT,
        progress: Progress | None = None,
        norms: Norms | None = None,
    ) -> Iterator[Tensor]:
        """The frames of each segment in turn, [B, 3, 17 or 16, H, W], for latents [B, c, t, h, w].

        Args:
            norms: for tiles of a picture, see `Norms`; an empty one is filled. Not with gradients.

        Raises:
            ValueError: the shape is not one the model takes.
        """
        self._check_method(method)
        _checked(z_Bcthw, self.config.z_channels, "latent")
        memory = Memory(norms=norms)
        done = 0
        length = method.segment // self._cadence
        for piece, last in with_last(regroup([z_Bcthw], length + 1, length)):
            frames = self._compute(self.decoder, piece.to(self._like), memory, not done, last, method)
            done += frames.shape[2]
            yield frames
            if progress:
                progress(done)

    def posterior(self, x_B3THW: Tensor, method: Method = DEFAULT, progress: Progress | None = None) -> Posterior:
        """[B, 3, T, H, W] in −1..1 → the posterior of the latents, [B, c, t, h, w]; see `encode_stream`."""
        parts = list(self.encode_stream(x_B3THW, method, progress))
        return Posterior(torch.cat([p.mean for p in parts], 2), torch.cat([p.logvar for p in parts], 2))

    def encode(self, x_B3THW: Tensor, method: Method = DEFAULT, progress: Progress | None = None) -> Tensor:
        """The latent of a video: its posterior's mean, [B, c, t, h, w], raw."""
        if method.tiles == (1, 1):
            return torch.cat([posterior.mean for posterior in self.encode_stream(x_B3THW, method, progress)], dim=2)

        def latents(rows: slice, columns: slice, method: Method, progress: Progress) -> Iterator[Tensor]:
            for posterior in self.encode_stream(x_B3THW[:, :, :, rows, columns], method, progress):
                yield posterior.mean

        _checked(x_B3THW, 3, "video")
        B, _, T, H, W = x_B3THW.shape
        side = self.config.spatial_factor
        sides = (padded_frames(T, self._cadence) - 1) // self._cadence + 1, -(-H // side), -(-W // side)
        z = torch.empty(B, self.config.z_channels, *sides, dtype=self._like.dtype, device=self._like.device)
        return self._by_tiles(latents, z, sides[1:], (side, 1), T, method, progress)

    def decode(self, z_Bcthw: Tensor, method: Method = DEFAULT, progress: Progress | None = None) -> Tensor:
        """Raw latents [B, c, t, h, w] → video [B, 3, 4(t − 1) + 1, 8h, 8w], about −1..1, not clipped."""
        if method.tiles == (1, 1):
            return torch.cat(list(self.decode_stream(z_Bcthw, method, progress)), dim=2)

        def frames(rows: slice, columns: slice, method: Method, progress: Progress) -> Iterator[Tensor]:
            return self.decode_stream(z_Bcthw[:, :, :, rows, columns], method, progress)

        B, _, t, h, w = _checked(z_Bcthw, self.config.z_channels, "latent").shape
        side, T = self.config.spatial_factor, self._cadence * (t - 1) + 1
        x = torch.empty(B, 3, T, side * h, side * w, dtype=self._like.dtype, device=self._like.device)
        return self._by_tiles(frames, x, (h, w), (1, side), T, method, progress)

    def _by_tiles(
        self,
        stream: Callable[[slice, slice, Method, Progress], Iterator[Tensor]],
        out: Tensor,
        sides: tuple[int, int],
        scales: tuple[int, int],
        frames: int,
        method: Method,
        progress: Progress | None,
    ) -> Tensor:
        """Fill `out` tile by tile; `scales` are the source's and the result's rows per latent."""
        source, result = scales
        found = list(tiles(self.config, *sides, method.tiles, decode=scales[0] == 1))
        for i, tile in enumerate(found):

            def report(done: int, i: int = i) -> None:
                if progress:
                    progress((i * frames + done) // len(found))

            start = 0
            outer = [slice(lo * source, hi * source) for lo, hi in tile.outer]
            inner = [slice(lo * result, hi * result) for lo, hi in tile.inner]
            within = [
                slice((lo - first) * result, (hi - first) * result)
                for (lo, hi), (first, _) in zip(tile.inner, tile.outer, strict=True)
            ]
            for part in stream(outer[0], outer[1], replace(method, tiles=(1, 1)), report):
                out[:, :, start : start + part.shape[2], *inner] = part[:, :, :, *within]
                start += part.shape[2]
        return out

    def _compute(
        self, coder: Encoder | Decoder, x: Tensor, memory: Memory, first: bool, last: bool, method: Method
    ) -> Tensor:
        """A segment: by the modules themselves where a gradient is wanted, else by strips."""
        if torch.is_grad_enabled() and (x.requires_grad or self._like.requires_grad):
            return coder(x, memory.cache)
        with torch.no_grad():
            return compute_segment(coder, x, memory, first, last, method)

    @property
    def _like(self) -> Tensor:
        return self.decoder.conv_out.conv.weight

    @property
    def _cadence(self) -> int:
        return self.config.temporal_compress_times

    def _check_method(self, method: Method) -> None:
        if method.tiles != (1, 1):
            raise ValueError("a stream gives whole pictures, segment by segment: for tiles use encode or decode")
        frames = method.segment
        if not self.config.per_position and frames != SEGMENT_FRAMES:
            raise ValueError(
                f"segments of {frames} frames; this model has GroupNorm over a segment of {SEGMENT_FRAMES} frames"
            )
        if frames < 1 or frames % self._cadence:
            raise ValueError(f"segments of {frames} frames; expected a multiple of {self._cadence}")


def _checked(x: Tensor, channels: int, name: str) -> Tensor:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, {channels}, T, H, W]")
    return x


def _unfold(kvae: KVAE, _: object) -> None:
    kvae.unfold()
