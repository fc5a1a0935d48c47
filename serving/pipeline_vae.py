"""PipelineVAE: a KVAE as the VAE of diffusers' pipelines, of musubi-tuner and of Kandinsky's own code.

pipe.vae = PipelineVAE.of(HybridVAE(kvae, decode_adapter, encode_adapter))
z = pipe.vae.encode(x).latent_dist.mode()      # or encode(x)[0]
x = pipe.vae.decode(z).sample                  # or decode(z, return_dict=False)[0]

All of them ask their VAE for the same few names, so one class answers them all. HostVAE computes: it streams clips,
plans for the memory at hand and shows progress (`pipe.vae.host.on_progress`).

# x_B3THW pixels in −1..1 (x/127.5 − 1), z_Bcthw raw latents; pipelines scale them
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.hybrid import HybridVAE
from .host_vae import HostVAE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownLatent:
    """The posterior of an encoder that gives one latent [B, c, t, h, w]: each sample is its mode."""

    z_Bcthw: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.z_Bcthw

    def mode(self) -> Tensor:
        return self.z_Bcthw


class Encoded(NamedTuple):
    latent_dist: KnownLatent


class Decoded(NamedTuple):
    sample: Tensor


class PipelineVAE(nn.Module):
    """The VAE of a pipeline, for latents of the host's space. It is for inference: it computes no gradients.

    Attributes:
        host: computes, reports progress, and keeps to the memory that `host.planner.limit` was given.
        config: what pipelines read, and sometimes set. `scaling_factor` is 1.0 for a space without one: pipelines then
            pass on raw latents.
    """

    def __init__(self, host: HostVAE):
        super().__init__()
        self.host = host.eval()
        space = host.space
        self.scaling_factor = 1.0 if space.scaling_factor is None else space.scaling_factor
        self.temporal_compression_ratio, self.spatial_compression_ratio = space.temporal_factor, space.spatial_factor
        self.config = SimpleNamespace(
            scaling_factor=self.scaling_factor,
            latent_channels=space.channels,
            temporal_compression_ratio=space.temporal_factor,
            spatial_compression_ratio=space.spatial_factor,
        )

    @classmethod
    def of(cls, vae: HybridVAE, memory_gb: float = 0) -> PipelineVAE:
        """A HybridVAE as the VAE of a pipeline; the weights are shared.

        Args:
            memory_gb: GB that may be used in addition to the weights and the frames. 0 takes what is free on a GPU of
                CUDA, and sets no limit elsewhere. A smaller budget gives the same result, more slowly.
        """
        host = HostVAE(vae.kvae, vae.decode_adapter, vae.encode_adapter)
        host.planner.limit(memory_gb)
        return cls(host)

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @torch.no_grad()
    def encode(self, x_B3THW: Tensor, return_dict: bool = True, opt_tiling: object = None) -> Encoded:
        """[B, 3, T, H, W] → raw latents [B, c, (T − 1) // 4 + 1, h, w], with the dtype and device of x.

        If T is not 4n + 1, the last one to three frames are dropped, since pipelines count latents that way.

        Args:
            return_dict, opt_tiling: without effect: the result is a tuple that also has names.

        Raises:
            ValueError, WeightsError, BudgetError, torch.OutOfMemoryError: as `HostVAE.encode`.
            RuntimeError: the weights are offloaded layer by layer.
        """
        with self._at_work():
            z = self.host.encode(x_B3THW, self.device)
        return Encoded(KnownLatent(z.to(x_B3THW).contiguous()))

    @torch.no_grad()
    def decode(self, z_Bcthw: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Decoded:
        """Raw latents [B, c, t, h, w] → [B, 3, 4(t − 1) + 1, H, W], about −1..1, with the dtype and device of z.

        Args:
            return_dict, generator: without effect: the result is a tuple that also has names.

        Raises:
            ValueError, WeightsError, BudgetError, MemoryError, torch.OutOfMemoryError: as `HostVAE.decode`.
            RuntimeError: the weights are offloaded layer by layer.
        """
        with self._at_work():
            x = self.host.decode(z_Bcthw.to(self.device))
        return Decoded(x.to(z_Bcthw))

    def to(self, *args: Any, **options: Any) -> PipelineVAE:
        """Move and convert the weights. float16, which KVAE is not made for, leaves their dtype, with a warning."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **options)
        refused = dtype is torch.float16
        if refused:
            logger.warning("KVAE is not made for float16; it stays in %s", str(self.dtype).removeprefix("torch."))
        return super().to(device=device, dtype=None if refused else dtype, non_blocking=non_blocking)

    def half(self) -> PipelineVAE:
        return self.to(torch.float16)

    def _no_effect(self, *args: Any, **options: Any) -> None:
        """HostVAE needs no setting to work in little memory: it plans, and its tiles change nothing."""

    enable_tiling = disable_tiling = enable_slicing = disable_slicing = _no_effect
    enable_spatial_tiling = apply_tiling = set_chunk_size_for_causal_conv_3d = _no_effect

    @property
    def _weight(self) -> Tensor:
        return next(self.host.kvae.parameters())

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Bring the weights back if accelerate has offloaded them, and compute in their dtype, not in autocast's."""
        if hook := getattr(self, "_hf_hook", None):
            hook.pre_forward(self)
        kind = self.device.type
        if kind == "meta":
            raise RuntimeError(
                "the weights of this VAE are offloaded layer by layer, but it computes with them all; use "
                "enable_model_cpu_offload in place of enable_sequential_cpu_offload"
            )
        autocast = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            yield
