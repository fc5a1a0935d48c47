"""Models with random weights, the same in every run: KVAE, and the modules of diffusers with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLKVAEVideo, Kandinsky6SRVAE
from torch import Tensor

from kvae_comfyui.benchmarks.gpu.measure import Run
from kvae_comfyui.benchmarks.gpu.setup import Setup, Size
from kvae_comfyui.kvae import KVAE, Execution, KVAEConfig
from kvae_comfyui.kvae.load import official_key


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within this context, models are made on the device and in the dtype, with the same random weights each time."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_kvae(config: KVAEConfig, device: torch.device, dtype: torch.dtype) -> KVAE:
    """A KVAE, frozen. It is not folded yet."""
    with made_on(device, dtype):
        return KVAE(config).eval().requires_grad_(False)


def random_hunyuan(setup: Setup, dtype: torch.dtype) -> Any:
    """HunyuanVideo's VAE in the module of diffusers, frozen."""
    with made_on(setup.device, dtype):
        vae: Any = AutoencoderKLHunyuanVideo(**setup.hunyuan)
    return vae.eval().requires_grad_(False)


def diffusers_twin(kvae: KVAE) -> Any:
    """The module of diffusers for a KVAE, with the same weights; None for a 2.0-t4s8, for which it has none.

    Args:
        kvae: not folded.
    """
    config, weight = kvae.config, kvae.decoder.conv_out.conv.weight
    with made_on(weight.device, weight.dtype):
        if config.norm == "group":
            width = config.encoder_widths[0]
            mult = tuple(each // width for each in config.encoder_widths)
            twin: Any = AutoencoderKLKVAEVideo(width, mult, config.num_res_blocks)
        elif config.padding == "zeros":
            widths = config.encoder_widths, config.decoder_widths
            twin = Kandinsky6SRVAE(3, 3, config.z_channels, *widths, config.num_res_blocks)
        else:
            return None
    state = kvae.state_dict()
    twin.load_state_dict({key: state[official_key(key)] for key in twin.state_dict()})
    return twin.eval().requires_grad_(False)


def source_of(config: KVAEConfig, direction: str, size: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random latents or pixels of a clip of this size, to decode or to encode."""
    frames, height, width = size
    generator = torch.Generator(device).manual_seed(0) if device.type != "meta" else None
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    if direction == "encode":
        return torch.rand(1, 3, *size, **options) * 2 - 1
    t, side = (frames - 1) // config.temporal_compress_times + 1, config.spatial_factor
    return torch.randn(1, config.z_channels, t, height // side, width // side, **options)


def run_of(model: Any, direction: str, source: Tensor, execution: Execution | None = None) -> Run:
    """A run of a KVAE, or of a module of diffusers, that returns frames or latents."""
    if isinstance(model, KVAE):
        return lambda: getattr(model, direction)(source, execution or Execution())
    if direction == "decode":
        return lambda: model.decode(source).sample
    return lambda: model.encode(source).latent_dist.mode()
