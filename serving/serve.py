"""ServedVAE: a KVAE as hosts expect a video VAE, with progress, and with its frames off the device as they come.

vae = ServedVAE(kvae, decode_adapter, encode_adapter)     # HunyuanVideo's latents; without adapters, KVAE's own
vae.on_progress = lambda done, total: print(done, total)  # once a segment; what it raises stops the work
z = vae.encode(x)
for frames in vae.decode_stream(z):                       # 17, 16, 16 … frames, wherever `output_device` says
    ...

# x_B3THW pixels in −1..1 as x/127.5 − 1, z_Bcthw raw latents
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from ..adapters.files import LatentAdapter
from ..adapters.hybrid import HybridVAE, NativeVAE
from ..adapters.inspect import check_finite, check_latent, check_shape, check_tensor
from ..adapters.spaces import LatentSpace
from ..kvae import KVAE, SEGMENT_FRAMES, BudgetError, Execution, Plan, plan_decode, plan_encode
from ..kvae.model import Progress
from .memory import room_for, with_less_memory

Executions = tuple[Callable[[], Execution], ...]  # to try in turn
WORKSPACE = 1.1  # what the convolution library takes for itself, beside what is counted


class ServedVAE(nn.Module):
    """A video VAE of `space`: encode and decode whole tensors, one clip of a batch after the other.

    Args:
        decode_adapter, encode_adapter: between the space to serve and KVAE's; with neither, KVAE's own is served.
        on_progress: called with (done, total) after each segment, in latent frames.
        free_memory: tells how many bytes there are for activations; None where there is no limit. The fastest way
            within them is taken, else the one that takes least.
        budget: bytes to stay within instead, without fail: a BudgetError where nothing does.
        approximate: whether blended tiles will do where nothing exact fits; not in streams.

    Raises:
        WeightsError: the adapters do not fit the KVAE or each other.
    """

    comfy_has_chunked_io = True  # newer ComfyUI: decode fills `output_buffer`, encode takes `device`

    def __init__(
        self, kvae: KVAE, decode_adapter: LatentAdapter | None = None, encode_adapter: LatentAdapter | None = None
    ):
        super().__init__()
        adapted = decode_adapter or encode_adapter
        self.vae = HybridVAE(kvae, decode_adapter, encode_adapter) if adapted else NativeVAE(kvae)
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.free_memory: Callable[[], int | None] = lambda: None
        self.budget: int | None = None
        self.approximate = False
        self.output_device = torch.device("cpu")

    @property
    def kvae(self) -> KVAE:
        return self.vae.kvae

    @property
    def space(self) -> LatentSpace:
        return self.vae.space

    def encode(self, x_B3THW: Tensor, device: torch.device | None = None) -> Tensor:
        """[B, 3, T, H, W] → raw latents [B, c, (T − 1) // 4 + 1, H/8, W/8], in the dtype of the weights.

        The last one to three frames of a T that is not 4n + 1 are left out: a host counts latents like that.

        Raises:
            ValueError: no frames, sides that the VAE does not take, or pixels that are not finite.
            WeightsError: there is no adapter to encode with.
            BudgetError: see `budget`.
            torch.OutOfMemoryError: not even the way that takes least fits.
        """
        x = self._whole(x_B3THW)
        return self._encode(x, self._executions(plan_encode, x.shape), device)

    def decode(self, z_Bcthw: Tensor, output_buffer: Tensor | None = None) -> Tensor:
        """Raw latents [B, c, t, h, w] → float32 [B, 3, 4(t − 1) + 1, H, W] on `output_device`, or in the buffer given.

        Raises:
            ValueError: not latents of this space, or not finite.
            WeightsError: there is no adapter to decode with.
            BudgetError: see `budget`.
            MemoryError: the frames do not fit.
            torch.OutOfMemoryError: not even the way that takes least fits.
        """
        x = self._frames(z_Bcthw.shape) if output_buffer is None else output_buffer
        return self._decode(x, z_Bcthw, self._executions(plan_decode, z_Bcthw.shape))

    def decode_stream(self, z_Bcthw: Tensor) -> Iterator[Tensor]:
        """The frames of each clip in turn, segment by segment: [1, 3, 17, H, W], [1, 3, 16, H, W] …

        Raises:
            ValueError, WeightsError, BudgetError, MemoryError, torch.OutOfMemoryError: as `decode`.
        """
        self.check_room(z_Bcthw.shape, stream=True)
        check_latent(z_Bcthw, self.space)
        reports = self._progress(len(z_Bcthw), z_Bcthw.shape[2])
        for z, report in zip(z_Bcthw.split(1), reports, strict=True):
            for frames in self._decode_clip(z, report):
                yield frames.to(self.output_device)

    def decode_output_shape(self, z_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what latents of shape [B, c, t, h, w] decode to.

        Raises:
            ValueError: it is not the shape of latents of this space.
        """
        check_shape(z_shape, self.space)
        b, _, t, h, w = z_shape
        return b, 3, self.space.time * (t - 1) + 1, self.space.space * h, self.space.space * w

    def check_room(self, z_shape: Sequence[int], stream: bool) -> None:
        """Whether there is room for all frames of latents of this shape, or for those of one segment of a stream.

        Raises:
            ValueError: it is not the shape of latents of this space.
            MemoryError, torch.OutOfMemoryError: there is none.
        """
        if not stream:
            self._frames(z_shape)
            return
        *_, H, W = self.decode_output_shape(z_shape)
        what = f"frames, {SEGMENT_FRAMES} of {W}x{H}: make them smaller"
        room_for((SEGMENT_FRAMES, 3, H, W), self.output_device, what)

    def memory_used_decode(self, z_shape: Sequence[int], dtype: torch.dtype) -> float:
        """Bytes that decoding latents of this shape needs beside the weights."""
        return self._scaled(self._plan(plan_decode, z_shape, self.budget), dtype)

    def memory_used_encode(self, x_shape: Sequence[int], dtype: torch.dtype) -> float:
        """Bytes that encoding pixels of this shape needs beside the weights."""
        clip = prod(x_shape[1:]) * (torch.float32.itemsize + dtype.itemsize)
        return self._scaled(self._plan(plan_encode, x_shape, self.budget), dtype) + clip

    def _frames(self, z_shape: Sequence[int]) -> Tensor:
        b, _, T, H, W = shape = self.decode_output_shape(z_shape)
        what = f"frames, {b} x {T} of {W}x{H}: write them to a file as they come (KVAE Decode to Video), or make fewer"
        return room_for(shape, self.output_device, what)

    def _whole(self, x_B3THW: Tensor) -> Tensor:
        """The first 4n + 1 frames, once they are checked."""
        side = self.space.space
        check_tensor(x_B3THW, "pixels")
        if x_B3THW.ndim != 5 or x_B3THW.shape[2] == 0 or min(x_B3THW.shape[3:]) < side:
            raise ValueError(
                f"pixels have shape {list(x_B3THW.shape)}; expected [B, 3, T, H, W] with at least one frame "
                f"and {side} x {side} pixels"
            )
        check_finite(x_B3THW, "pixels")
        return x_B3THW[:, :, : self.space.time * ((x_B3THW.shape[2] - 1) // self.space.time) + 1]

    def _scaled(self, plan: Plan, dtype: torch.dtype) -> float:
        """What the plan, which counts in the dtype of the weights, takes in another."""
        return WORKSPACE * plan.peak * dtype.itemsize / next(self.kvae.parameters()).dtype.itemsize

    def _encode(self, x_B3THW: Tensor, executions: Executions, device: torch.device | None = None) -> Tensor:
        clips = x_B3THW.split(1)
        reports = self._progress(len(clips), (x_B3THW.shape[2] - 1) // self.space.time + 1)

        def work(clip: Tensor, report: Progress, execution: Execution) -> Iterator[Tensor]:
            yield self.vae.encode(self._place(clip, device), execution, report)

        latents = (with_less_memory(partial(work, *each), executions) for each in zip(clips, reports, strict=True))
        return torch.cat([z for each in latents for z in each])

    def _decode(self, x_B3THW: Tensor, z_Bcthw: Tensor, executions: Executions) -> Tensor:
        """The frames of all clips, into the tensor given."""
        check_latent(z_Bcthw, self.space)
        reports = self._progress(len(z_Bcthw), z_Bcthw.shape[2])

        def work(x: Tensor, z: Tensor, report: Progress, execution: Execution) -> Iterator[None]:
            if execution.overlap is not None:
                x.zero_()  # tiles that overlap are added up
            for part in self.vae.decode_parts(self._place(z), execution, report):
                part.put(x)
                yield

        for each in zip(x_B3THW.split(1), z_Bcthw.split(1), reports, strict=True):
            deque(with_less_memory(partial(work, *each), executions), maxlen=0)
        return x_B3THW

    def _decode_clip(self, z_1cthw: Tensor, report: Progress) -> Iterator[Tensor]:
        """The frames of one clip, each once: a second try begins at the first frame as well."""
        sent = 0

        def work(execution: Execution) -> Iterator[Tensor]:
            nonlocal sent
            done = 0
            for frames in self.vae.decode_stream(self._place(z_1cthw), execution):
                done += frames.shape[2]
                if done > sent:
                    frames, sent = frames[:, :, sent - done :], done
                    yield frames
                    report(done)

        return with_less_memory(work, self._executions(plan_decode, z_1cthw.shape, stream=True))

    def _executions(self, plan: Callable[..., Plan], shape: Sequence[int], stream: bool = False) -> Executions:
        """The way to compute, and the one to fall back on."""
        return partial(self._execution, plan, shape, stream), partial(self._nearest, plan, shape, 0, stream)

    def _execution(self, plan: Callable[..., Plan], shape: Sequence[int], stream: bool = False) -> Execution:
        if self.budget is not None:
            return self._plan(plan, shape, self.budget, stream).execution
        return self._nearest(plan, shape, self.free_memory(), stream)

    def _nearest(self, plan: Callable[..., Plan], shape: Sequence[int], budget: int | None, stream: bool) -> Execution:
        try:
            return self._plan(plan, shape, budget, stream).execution
        except BudgetError as error:
            return error.least.execution  # the count is cautious; a host that runs out all the same falls back to tiles

    def _plan(self, plan: Callable[..., Plan], shape: Sequence[int], budget: int | None, stream: bool = False) -> Plan:
        within = None if budget is None else int(budget / WORKSPACE)
        try:
            return plan(self.kvae, _one(shape), within, stream=stream, approximate=self.approximate)
        except BudgetError as error:
            least = Plan(error.least.execution, int(WORKSPACE * error.least.peak) + 1)
            raise BudgetError(budget, least) from None  # type: ignore[arg-type]

    def _place(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        """To the dtype of the weights; and the weights to the input, where a host left some of them elsewhere."""
        x = x.to(device=device or x.device, dtype=next(self.kvae.parameters()).dtype)
        if any(parameter.device != x.device for parameter in self.parameters()):
            self.to(x.device)
        return x

    def _progress(self, clips: int, latent_frames: int) -> list[Progress]:
        """For each clip: takes how many of its frames are done."""
        told = 0

        def report(frames: int, clip: int) -> None:
            nonlocal told
            done = clip * latent_frames + -(-frames // self.space.time)
            if done > told:  # less, where memory ran out and a clip is begun again
                told = done
                self.on_progress(done, clips * latent_frames)

        return [partial(report, clip=clip) for clip in range(clips)]


def _one(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one clip of a batch. A host asks for the memory of anything, before it is refused: empty, or 4D."""
    return 1, 1, *(max(1, side) for side in (1, 1, 1, *shape)[-3:])


def to_image(x: Tensor) -> Tensor:
    """−1..1 → 0..1, clipped. In place, and returned: hosts differ in which of the two they use."""
    return x.add_(1).div_(2).clamp_(0, 1)
