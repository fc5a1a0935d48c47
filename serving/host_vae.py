"""HostVAE: a KVAE with the interface that hosts expect of a video VAE.

vae = HostVAE(kvae, decode_adapter, encode_adapter)       # HunyuanVideo's latents; without adapters, KVAE's own
vae.on_progress = lambda done, total: print(done, total)  # at the start and after each segment; it may raise
vae.on_frames = lambda frames: show(frames[0, :, 0])      # of each segment, as it is decoded; so here
z = vae.encode(x)
for frames in vae.decode_stream(z):                       # 17, 16, 16 … frames, on `output_device`
    ...

HostVAE checks its inputs once, chooses how to compute them within the host's memory, reports progress, and moves frames
off the device as they are made. Tiles of a size that a host asks for are blended where they overlap: that needs less
memory than any exact way, and is not exact (see `kvae.Execution`). Each tile is streamed through the whole clip. Tiles
in time would cut a causal VAE off from the frames before them, so the video would flicker at their edges. They would
save nothing, since memory does not grow with the length. Adapters convert the whole picture, never a tile.

# x_B3THW pixels in −1..1 in HunyuanVideo's convention (x/127.5 − 1), z_Bcthw raw latents
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from ..adapters.adapter import LatentAdapter
from ..adapters.checks import check_finite, check_shape, check_tensor
from ..adapters.hybrid import HybridVAE
from ..adapters.spaces import LatentSpace
from ..kvae import KVAE, SEGMENT_FRAMES, plan_decode, plan_encode
from .clip_work import Chunks, Report, Show, decode_clip, decode_clip_stream, encode_clip, encode_clip_stream
from .ladder import Ladder
from .latent_statistics import warn_of_faults
from .memory import room_for
from .planning import Planner


class HostVAE(nn.Module):
    """A video VAE for latents of `space`. It computes the clips of a batch one by one.

    Args:
        decode_adapter, encode_adapter: between the space of the host's latents and KVAE's; see `HybridVAE`.

    Attributes:
        on_progress: called with (done, total) at the start and after each segment, in latent frames of the whole batch.
        on_frames: called with the frames of each segment as they are decoded, float32 [1, 3, n, H, W] in −1..1: each
            frame once, but none that are decoded in tiles. Copy what you keep: the memory may be used again.
        planner: chooses how to compute within the memory that it is told of.
        latents_checked: whether the caller has checked that latents are finite, so that `decode` does not scan them.
        output_device: where decoded frames go.
        pin_memory: whether frames may go from a GPU to the host through pinned memory.

    Raises:
        WeightsError: the adapters do not fit the KVAE or each other.
    """

    comfy_has_chunked_io = True  # newer ComfyUI: decode fills `output_buffer`, encode accepts `device`

    def __init__(
        self, kvae: KVAE, decode_adapter: LatentAdapter | None = None, encode_adapter: LatentAdapter | None = None
    ):
        super().__init__()
        self.vae = HybridVAE(kvae, decode_adapter, encode_adapter)
        adapters = (plan_decode, decode_adapter), (plan_encode, encode_adapter)
        self.planner = Planner(kvae, adapters={plan: adapter for plan, adapter in adapters if adapter})
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.on_frames: Show = lambda frames: None
        self.latents_checked = False
        self.output_device = torch.device("cpu")
        self.pin_memory = True

    @property
    def kvae(self) -> KVAE:
        return self.vae.kvae

    @property
    def space(self) -> LatentSpace:
        return self.vae.space

    @property
    def side(self) -> int:
        """Rows, and columns, of pixels that every clip is a multiple of; see `HybridVAE`."""
        return self.vae.side

    def with_kvae(self, kvae: KVAE) -> HostVAE:
        """A copy with another KVAE of the same weights, for example on another device. The adapters are shared.

        Raises:
            WeightsError: the adapters do not fit this KVAE.
        """
        host = copy(self)
        host._modules = {"vae": HybridVAE(kvae, self.vae.decode_adapter, self.vae.encode_adapter).eval()}
        host.planner = replace(self.planner, kvae=kvae)
        return host

    def encode(self, x_B3THW: Tensor, device: torch.device | None = None) -> Tensor:
        """[B, 3, T, H, W] → raw latents [B, c, (T − 1) // 4 + 1, h, w], in the dtype of the weights.

        If T is not 4n + 1, the last one to three frames are dropped, since hosts count latents that way.

        Raises:
            ValueError: no frames, sides below one latent, or pixels that are not finite.
            WeightsError: the adapter for encoding is missing.
            BudgetError: nothing fits the planner's budget.
            torch.OutOfMemoryError: not even the execution that needs least fits.
        """
        x = self._checked_pixels(x_B3THW)
        self._bring_weights(device or x.device)
        # one more copy on the device, and the clip itself if it is not there yet
        weight, copies = next(self.kvae.parameters()), 1 if device is None else 2
        held = copies * prod(x.shape[1:]) * weight.dtype.itemsize
        return self._encode(x, self.planner.ladder(plan_encode, x.shape, held=held))

    def encode_stream(self, chunks: Chunks, x_shape: Sequence[int]) -> Tensor:
        """Raw latents [1, c, t, h, w] of a clip that comes chunk by chunk: memory is flat in its length.

        Args:
            chunks: makes the pixels from the start, [1, 3, n, H, W], cut anywhere in time; called again if memory runs
                out. Values are not checked.
            x_shape: of the whole clip, [1, 3, 4n + 1, H, W].

        Raises:
            ValueError, WeightsError, BudgetError, torch.OutOfMemoryError: as `encode`.
        """
        self.vae.check_encodes()
        ladder = self.planner.ladder(plan_encode, x_shape, stream=True)
        (report,) = self._reports(1, (x_shape[2] - 1) // self.space.temporal_factor + 1)
        return encode_clip_stream(self.vae, chunks, ladder, report)

    def encode_tiled(
        self, x_B3THW: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64, **_: int
    ) -> Tensor:
        """Encode by tiles of at most tile_x x tile_y pixels, blended over at least `overlap` pixels: not exact.

        Raises:
            ValueError, WeightsError, BudgetError: as `encode`; or the overlap is as large as a tile.
        """
        x, side = self._checked_pixels(x_B3THW), self.kvae.config.spatial_factor
        x = x[..., : x.shape[3] // self.side * self.side, : x.shape[4] // self.side * self.side]
        tile = tile_y // side, tile_x // side
        self._bring_weights(x.device)
        return self._encode(x, self.planner.tiles(plan_encode, x.shape, tile, overlap // side, side))

    def decode(self, z_Bcthw: Tensor, output_buffer: Tensor | None = None) -> Tensor:
        """Raw latents [B, c, t, h, w] → float32 [B, 3, 4(t − 1) + 1, H, W] on `output_device`, or in `output_buffer`.

        Raises:
            ValueError: latents of another shape than those of `space`, or values that are not finite.
            WeightsError: the adapter for decoding is missing.
            BudgetError: nothing fits the planner's budget.
            MemoryError: there is no memory for the frames.
            torch.OutOfMemoryError: not even the execution that needs least fits.
        """
        x = self._empty_frames(z_Bcthw.shape) if output_buffer is None else output_buffer
        self._check_latent(z_Bcthw)
        self._bring_weights(z_Bcthw.device)
        held = self._frame_bytes(z_Bcthw.shape)
        return self._decode(x, z_Bcthw, self.planner.ladder(plan_decode, self.kvae_shape(z_Bcthw.shape), held=held))

    def decode_tiled(self, z_Bcthw: Tensor, tile_x: int = 32, tile_y: int = 32, overlap: int = 8, **_: int) -> Tensor:
        """Decode by tiles of at most tile_x x tile_y latents, blended over at least `overlap` latents: not exact.

        Arguments for tiles in time are ignored.

        Raises:
            ValueError, WeightsError, BudgetError, MemoryError: as `decode`; or the overlap is as large as a tile.
        """
        x = self._empty_frames(z_Bcthw.shape)
        self._check_latent(z_Bcthw)
        self._bring_weights(z_Bcthw.device)
        held, shape = self._frame_bytes((*z_Bcthw.shape[:3], tile_y, tile_x)), self.kvae_shape(z_Bcthw.shape)
        tile = self._kvae_rows(tile_y), self._kvae_rows(tile_x)
        ladder = self.planner.tiles(plan_decode, shape, tile, self._kvae_rows(overlap), side=1, held=held)
        return self._decode(x, z_Bcthw, ladder)

    def decode_stream(self, z_Bcthw: Tensor) -> Iterator[Tensor]:
        """Decode each clip in turn, segment by segment: [1, 3, 17, H, W], [1, 3, 16, H, W] …

        Raises:
            ValueError, WeightsError, BudgetError, MemoryError, torch.OutOfMemoryError: as `decode`.
        """
        self.check_room(z_Bcthw.shape, stream=True)
        self._check_latent(z_Bcthw)
        self._bring_weights(z_Bcthw.device)
        held, shape = self._frame_bytes(z_Bcthw.shape), self.kvae_shape(z_Bcthw.shape)
        ladder = self.planner.ladder(plan_decode, shape, stream=True, held=held)
        reports = self._reports(len(z_Bcthw), z_Bcthw.shape[2])
        for z, report in zip(z_Bcthw.split(1), reports, strict=True):
            for frames in decode_clip_stream(self.vae, z, ladder, report, self.on_frames, self._pins(z.device)):
                yield frames.to(self.output_device)
                del frames  # before the next ones are computed

    def decode_output_shape(self, z_shape: Sequence[int]) -> tuple[int, ...]:
        """Latents of shape [B, c, t, h, w] → the shape [B, 3, T, H, W] of the frames they decode to.

        Raises:
            ValueError: not the shape of latents of `space`, or sides that do not make whole latents of the KVAE.
        """
        check_shape(z_shape, self.space)
        if self.vae.decode_adapter:
            self.vae.decode_adapter.check_shape(z_shape)
        return self.space.decoded_shape(z_shape)

    def kvae_shape(self, z_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that latents of this shape have for the planner: rows and columns are those of KVAE's latents."""
        return *z_shape[:-2], *map(self._kvae_rows, z_shape[-2:])

    def check_room(self, z_shape: Sequence[int], stream: bool) -> None:
        """Raise unless there is room for all frames of latents of this shape, or for one segment of a stream.

        Raises:
            ValueError: not the shape of latents of `space`.
            MemoryError, torch.OutOfMemoryError: there is no room.
        """
        if not stream:
            self._empty_frames(z_shape)
            return
        *_, H, W = self.decode_output_shape(z_shape)
        what = f"frames, {SEGMENT_FRAMES} of {W}x{H}: make them smaller"
        room_for((SEGMENT_FRAMES, 3, H, W), self.output_device, what)

    def memory_used_decode(self, z_shape: Sequence[int], dtype: torch.dtype, stream: bool = False) -> float:
        """Bytes that decoding latents of this shape needs in addition to KVAE's weights.

        Raises:
            BudgetError: nothing fits the budget.
        """
        held = self._frame_bytes(z_shape) + self._adapter_bytes()
        return self.planner.memory(plan_decode, self.kvae_shape(z_shape), dtype, stream, held)

    def memory_used_encode(self, x_shape: Sequence[int], dtype: torch.dtype) -> float:
        """Bytes that encoding pixels of this shape needs in addition to KVAE's weights.

        Raises:
            BudgetError: nothing fits the budget.
        """
        held = self._clip_bytes(x_shape, dtype) + self._adapter_bytes()
        return self.planner.memory(plan_encode, x_shape, dtype, held=held)

    def preferred_decode_tile(self, free_memory: float, dtype: torch.dtype) -> int:
        """The side, in latents, of the largest square tile that decodes in half of `free_memory` bytes."""
        side = self.planner.preferred_decode_tile(free_memory, dtype)
        return side * self.kvae.config.spatial_factor // self.space.spatial_factor

    def _check_latent(self, z_Bcthw: Tensor) -> None:
        check_tensor(z_Bcthw, "latent")
        self.decode_output_shape(z_Bcthw.shape)
        if not self.latents_checked:
            check_finite(z_Bcthw, "latent")
        self.vae.check_decodes()
        warn_of_faults(z_Bcthw, self.space)

    def _checked_pixels(self, x_B3THW: Tensor) -> Tensor:
        """The first 4n + 1 frames, checked."""
        side, temporal_factor = self.side, self.space.temporal_factor
        check_tensor(x_B3THW, "pixels")
        if x_B3THW.ndim != 5 or x_B3THW.shape[2] == 0 or min(x_B3THW.shape[3:]) < side:
            raise ValueError(
                f"pixels have shape {list(x_B3THW.shape)}; expected [B, 3, T, H, W] with at least one frame "
                f"and {side} x {side} pixels"
            )
        check_finite(x_B3THW, "pixels")
        self.vae.check_encodes()
        return x_B3THW[:, :, : temporal_factor * ((x_B3THW.shape[2] - 1) // temporal_factor) + 1]

    def _empty_frames(self, z_shape: Sequence[int]) -> Tensor:
        b, _, T, H, W = shape = self.decode_output_shape(z_shape)
        what = f"frames, {b} x {T} of {W}x{H}: write them to a file as they come (KVAE Decode to Video), or make fewer"
        return room_for(shape, self.output_device, what)

    def _encode(self, x_B3THW: Tensor, ladder: Ladder) -> Tensor:
        clips = x_B3THW.split(1)
        reports = self._reports(len(clips), (x_B3THW.shape[2] - 1) // self.space.temporal_factor + 1)
        return torch.cat([encode_clip(self.vae, x, ladder, report) for x, report in zip(clips, reports, strict=True)])

    def _decode(self, x_B3THW: Tensor, z_Bcthw: Tensor, ladder: Ladder) -> Tensor:
        """Decode all clips into x_B3THW."""
        reports = self._reports(len(z_Bcthw), z_Bcthw.shape[2])
        for x, z, report in zip(x_B3THW.split(1), z_Bcthw.split(1), reports, strict=True):
            decode_clip(self.vae, z, x, ladder, report, self.on_frames, self._pins(z.device))
        return x_B3THW

    def _pins(self, device: torch.device) -> bool:
        """Whether frames are copied from this device to the host while the next segment is computed."""
        return self.pin_memory and device.type == "cuda" and self.output_device.type == "cpu"

    def _kvae_rows(self, rows: int) -> int:
        """Rows, or columns, of KVAE's latents for some of `space`, rounded up."""
        return -(-rows * self.space.spatial_factor // self.kvae.config.spatial_factor)

    @staticmethod
    def _clip_bytes(x_shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of one clip's pixels on the device, as a host may send them and in the dtype of the weights."""
        return prod(x_shape[1:]) * (torch.float32.itemsize + dtype.itemsize)

    def _adapter_bytes(self) -> int:
        """Bytes of the adapters' weights, which go where the KVAE goes."""
        adapters = self.vae.decode_adapter, self.vae.encode_adapter
        return sum(parameter.nbytes for adapter in adapters if adapter for parameter in adapter.parameters())

    def _frame_bytes(self, z_shape: Sequence[int]) -> int:
        """Bytes of the frames that wait on the device for their copy while the next segment is computed."""
        pixels = (SEGMENT_FRAMES + 1) * prod(z_shape[-2:]) * self.space.spatial_factor**2
        device = self.planner.device or next(self.kvae.parameters()).device
        return 3 * pixels * torch.float32.itemsize if self._pins(device) else 0

    def _bring_weights(self, device: torch.device) -> None:
        """Move weights that the host left elsewhere, as ComfyUI does with --novram, before free memory is asked for."""
        if any(parameter.device != device for parameter in self.parameters()):
            self.to(device)

    def _reports(self, clips: int, latent_frames: int) -> list[Report]:
        """A function for each clip, to be called with the number of its latent frames that are done."""
        told, total = 0, clips * latent_frames
        self.on_progress(0, total)

        def report(latents: int, clip: int) -> None:
            nonlocal told
            done = clip * latent_frames + latents
            if done > told:  # not so if memory ran out and the clip was restarted
                told = done
                self.on_progress(done, total)

        return [partial(report, clip=clip) for clip in range(clips)]


def to_image(x: Tensor) -> Tensor:
    """−1..1 → 0..1, clipped. In place, and returned: some hosts use the argument, others the result."""
    return x.add_(1).div_(2).clamp_(0, 1)
