"""A KVAE as ComfyUI's VAE: the one file that touches comfy.sd.VAE.

The parent's constructor sets the defaults of the installed ComfyUI and returns early, since it gets no weights. This
file sets what differs. HostVAE computes, and manages the memory of activations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache, partial

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..kvae import KVAE
from ..kvae.load import described_state
from ..serving.host_vae import HostVAE, to_image
from .progress import NodeProgress

DTYPES = [torch.bfloat16, torch.float32]


def working_dtype() -> torch.dtype:
    """The dtype in which ComfyUI runs VAEs on this machine, of DTYPES; --bf16-vae and --fp32-vae count."""
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device, DTYPES)
    if dtype in DTYPES:
        return dtype
    instead = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
    _say_instead(dtype, instead)
    return instead


@cache  # said once
def _say_instead(dtype: torch.dtype, instead: torch.dtype) -> None:
    asked, runs = (str(each).removeprefix("torch.") for each in (dtype, instead))
    logging.warning("KVAE is not made for %s (--fp16-vae); it runs in %s", asked, runs)


def patcher_of(kvae: KVAE) -> ModelPatcher:
    """What ComfyUI moves between devices: the KVAE without adapters, so that it can be kept when adapters change."""
    offload = comfy.model_management.vae_offload_device()
    return ModelPatcher(kvae, load_device=comfy.model_management.vae_device(), offload_device=offload)


def free_memory(device: torch.device) -> int:
    """Bytes that activations may use. What PyTorch keeps in its cache is free; what --reserve-vram keeps is not."""
    free = comfy.model_management.get_free_memory(device) - comfy.model_management.extra_reserved_memory()
    return max(0, int(free))


def free_once_unloaded(patcher: ModelPatcher) -> int:
    """Bytes that activations may use on the patcher's device once its model is there, and no other of ComfyUI's."""
    free = free_memory(patcher.load_device)
    if patcher.load_device.type in ("cpu", "mps"):  # models are unloaded into the same memory
        return free
    models = [each for each in comfy.model_management.current_loaded_models if each.model is not None]
    loaded = sum(each.model_loaded_memory() for each in models if each.device == patcher.load_device)
    return max(0, free + loaded - patcher.model_size())


def make_room(patcher: ModelPatcher) -> None:
    """Unload all models but this one from its device, and give PyTorch's cache back to the card."""
    ours = comfy.model_management.LoadedModel(patcher)  # equal to its entry in ComfyUI's list
    comfy.model_management.free_memory(1e30, patcher.load_device, keep_loaded=[ours])
    comfy.model_management.soft_empty_cache()


def connected(host: HostVAE, patcher: ModelPatcher) -> HostVAE:
    """A copy of the host with the patcher's KVAE. It shows progress in ComfyUI, and plans for the patcher's device."""
    host = copy(host) if patcher.model is host.kvae else host.with_kvae(patcher.model)
    progress = NodeProgress()
    host.on_progress, host.on_frames = progress.on_progress, progress.on_frames
    host.output_device = comfy.model_management.intermediate_device()
    host.pin_memory = getattr(comfy.model_management, "MAX_PINNED_MEMORY", 0) > 0  # 0.3.60 has none
    host.planner = replace(
        host.planner,
        device=patcher.load_device,
        free_memory=partial(free_memory, patcher.load_device),
        make_room=partial(make_room, patcher),
    )
    return host


class ComfyVAE(comfy.sd.VAE):
    """ComfyUI's VAE around a HostVAE: memory management, tiling and every stock node work on it unchanged.

    Args:
        patcher: the patcher of the KVAE.
    """

    _host: HostVAE
    _connected_to: ModelPatcher | None

    def __init__(self, host: HostVAE, patcher: ModelPatcher):
        with _without_weights_warning():
            super().__init__(sd={})
        del self.memory_used_decode, self.memory_used_encode  # the parent's attributes would hide the methods below
        self.patcher = patcher
        self.first_stage_model = host.eval()
        self.kvae_space = space = host.space
        temporal_factor, side = space.temporal_factor, space.spatial_factor
        self.latent_channels = space.channels
        self.latent_dim = 3
        self.output_channels = 3
        self.not_video = False
        self.handles_tiling = True  # for newer hosts; older ones call the two methods below
        self.upscale_ratio = (lambda t: max(0, temporal_factor * (t - 1) + 1), side, side)
        self.downscale_ratio = (lambda T: max(0, (T - 1) // temporal_factor + 1), side, side)
        self.upscale_index_formula = self.downscale_index_formula = (temporal_factor, side, side)
        self.process_output = to_image
        self.working_dtypes = DTYPES
        self.vae_dtype = next(host.kvae.parameters()).dtype
        self.disable_offload = True  # ComfyUI cannot move plain torch.nn layers in parts
        self.device = patcher.load_device
        self.output_device = comfy.model_management.intermediate_device()
        self.size = patcher.model_size()

    @property
    def first_stage_model(self) -> HostVAE:
        """What computes. It follows the patcher, which nodes such as Select VAE Device replace in a copy of a VAE."""
        if self._connected_to is not self.patcher:
            self._host, self._connected_to = connected(self._host, self.patcher), self.patcher
        return self._host

    @first_stage_model.setter
    def first_stage_model(self, model: HostVAE | KVAE | None) -> None:
        """Take a HostVAE. The patcher's own KVAE, which such nodes put here, would decode without its adapters.

        Raises:
            TypeError: another model.
        """
        if isinstance(model, HostVAE):
            self._host, self._connected_to = model, None
        elif model is not None and model is not self.patcher.model:  # None: the parent has no weights
            raise TypeError(
                f"A node puts a {type(model).__name__} in place of KVAE; this VAE works only with the model that "
                "Load KVAE gave it. Connect Load KVAE to the next node directly."
            )

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Crop frames [..., H, W, C] to whole latents, as the parent does.

        Raises:
            ValueError: they are smaller than one latent; the message states their sides before the crop.
        """
        side, (H, W) = self.first_stage_model.side, pixels.shape[-3:-1]
        if min(H, W) < side:
            raise ValueError(f"These pixels are {W} x {H}; expected at least {side} x {side}: make them larger.")
        if side > self.kvae_space.spatial_factor:  # which is all that the parent knows of
            pixels = _middle(_middle(pixels, -3, side), -2, side)
        return super().vae_encode_crop_pixels(pixels)

    def memory_used_decode(self, z_shape: Sequence[int], dtype: torch.dtype) -> float:
        """Bytes that decoding needs in addition to the weights; see `HostVAE`."""
        return self.first_stage_model.memory_used_decode(z_shape, dtype)

    def memory_used_encode(self, x_shape: Sequence[int], dtype: torch.dtype) -> float:
        """Bytes that encoding needs in addition to the weights; see `HostVAE`."""
        return self.first_stage_model.memory_used_encode(x_shape, dtype)

    def configured(self, budget: int | None, approximate: bool = False) -> ComfyVAE:
        """A copy that shares the weights.

        Args:
            budget, approximate: see `Planner`.
        """
        vae, host = copy(self), copy(self.first_stage_model)
        host.planner = replace(host.planner, budget=budget, approximate=approximate)
        vae._host = host
        return vae

    def decode_tiled_3d(self, samples, tile_t=None, tile_x=32, tile_y=32, overlap=(1, 8, 8)):
        """Decode [B, c, t, h, w] to 0..1 in tiles, sized in latents, for hosts that do not know `handles_tiling`."""
        z = samples.to(self.vae_dtype).to(self.device)
        return to_image(self.first_stage_model.decode_tiled(z, tile_x, tile_y, overlap[1]))

    def encode_tiled_3d(self, samples, tile_t=None, tile_x=512, tile_y=512, overlap=(1, 64, 64)):
        """Encode [B, 3, T, H, W] in 0..1 in tiles, sized in pixels, for the same hosts."""
        x = self.process_input(samples).to(self.vae_dtype).to(self.device)
        return self.first_stage_model.encode_tiled(x, tile_x, tile_y, overlap[1]).float().to(self.output_device)

    def get_sd(self) -> dict[str, torch.Tensor]:
        """What VAESave writes and Load KVAE reads: the KVAE's weights under their own names, and its config.

        The config is a tensor, since VAESave keeps only its own metadata. Adapters stay in their files.
        """
        return described_state(self.first_stage_model.kvae)

    def decode_stream(self, z_Bcthw: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield frames as IMAGEs [17 or 16, H, W, 3] in 0..1, segment by segment: memory does not grow."""
        memory = self.first_stage_model.memory_used_decode(z_Bcthw.shape, self.vae_dtype, stream=True)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)
        for frames in self.first_stage_model.decode_stream(z_Bcthw.to(self.device)):
            yield to_image(frames)[0].movedim(0, -1)


def _middle(pixels: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """The largest multiple of `multiple` along a dimension, cut from its middle, as the parent cuts."""
    n = pixels.shape[dim]
    return pixels.narrow(dim, n % multiple // 2, n - n % multiple)


@contextmanager
def _without_weights_warning() -> Iterator[None]:
    """Suppress ComfyUI's warning about missing weights: none are meant to be there."""

    def without_warning(record: logging.LogRecord) -> bool:
        return "No VAE weights" not in record.getMessage()

    logger = logging.getLogger()
    logger.addFilter(without_warning)
    try:
        yield
    finally:
        logger.removeFilter(without_warning)
