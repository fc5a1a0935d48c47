"""The two encoders of musubi-tuner's caches: the model's own VAE, or a KVAE with an adapter to the model's latents.

# x_13THW pixels in HunyuanVideo's −1..1 (x/127.5 − 1), z_cthw raw latents, frames uint8 [H, W, 3]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.spaces import LatentSpace
from ...kvae import SEGMENT_FRAMES
from ...kvae.paths import sha256_of
from ...kvae.pixels import HUNYUAN_HALF_RANGE, to_unit
from ...serving.host_vae import HostVAE
from ..errors import UserError
from ..options import HUNYUAN_HELP, option
from ..served import AUTO, ServedOptions, adapter_paths, dtype_of, load_served
from ..vaes import HunyuanVAE, load_hunyuan_vae, weights_file
from .cache_files import MADE_HERE

HUNYUAN, KVAE = "hunyuan", "kvae"
NABLA = 128  # pixels: 16 latents, a block of Kandinsky 5's sparse attention


@dataclass(kw_only=True)
class EncoderOptions(ServedOptions):
    """The options that say how clips are encoded."""

    encoder: str = option(
        HUNYUAN,
        "hunyuan: the model's own VAE, whose latents it was trained on; kvae: a KVAE and an adapter, in memory that "
        "does not grow with the length of a clip",
        choices=(HUNYUAN, KVAE),
    )
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP, metavar="VAE")


class Encoder(Protocol):
    """Encodes one clip at a time."""

    def encode(self, frames: Sequence[np.ndarray], height: int, width: int, seed: int | None) -> Tensor:
        """4n + 1 frames → raw latents [c, n + 1, h, w].

        Args:
            height, width: what frames are stretched to, if they have another size.
            seed: of a sample of the posterior. None: its mode.
        """


class WholeClips:
    """The VAE of HunyuanVideo or HunyuanVideo 1.5, over whole clips.

    diffusers' tiles of 17 frames would cut it off from the frames before them, which the models saw in their training.
    """

    def __init__(self, vae: HunyuanVAE):
        self.vae = vae

    def encode(self, frames: Sequence[np.ndarray], height: int, width: int, seed: int | None) -> Tensor:
        # a generator of the CPU gives the same draw for every device
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.vae.encode_unit(pixels(frames, height, width), generator)[0]


class Streamed:
    """A KVAE with an adapter to the latents of a model, segment by segment: memory does not grow with the length.

    The latents are the mode of the posterior, whatever the seed: an adapter gives no spread to sample from.
    """

    def __init__(self, host: HostVAE):
        self.host = host

    @torch.inference_mode()
    def encode(self, frames: Sequence[np.ndarray], height: int, width: int, seed: int | None) -> Tensor:
        def chunks() -> Iterator[Tensor]:
            for start in range(0, len(frames), SEGMENT_FRAMES):
                yield pixels(frames[start : start + SEGMENT_FRAMES], height, width)

        return self.host.encode_stream(chunks, (1, 3, len(frames), height, width))[0]


def load_encoder(options: EncoderOptions, space: LatentSpace) -> Encoder:
    """Load the encoder that the options name.

    Raises:
        UserError: it makes latents of another space, cannot keep a memory budget, or an adapter is missing.
        WeightsError: a file is not what it should be.
    """
    if options.encoder == KVAE:
        return Streamed(load_served(options, space.name, ("encode",)))
    if options.memory_gb:
        raise UserError(
            f"--memory-gb is {options.memory_gb:g}; expected 0 with --encoder {HUNYUAN}, which needs whole clips at "
            f"once. Choose --encoder {KVAE}, or shorter or smaller clips"
        )
    on_gpu = torch.device(options.device).type == "cuda"
    # as musubi-tuner's own caching
    dtype = torch.float16 if options.dtype == AUTO and on_gpu else dtype_of(options)
    vae = load_hunyuan_vae(options.hunyuan_vae, options.device, dtype)
    if vae.space != space:
        raise UserError(
            f"--hunyuan-vae {options.hunyuan_vae} makes latents of {vae.space.name}; this architecture needs those of "
            f"{space.name}"
        )
    return WholeClips(vae)


def made_by(options: EncoderOptions, space: str) -> dict[str, str]:
    """What a cache's metadata say of its encoder: names and hashes of the weights.

    Args:
        space: the name of the space of the latents.

    Raises:
        WeightsError: there are no weights.
    """
    if options.encoder == KVAE:
        name, vae = options.kvae, weights_file(options.kvae, "kvae")
        _, adapter = adapter_paths(options, space, ("encode",))
    else:
        name, vae, adapter = options.hunyuan_vae, weights_file(options.hunyuan_vae, "hunyuan"), ""
    return {
        "kvae_encoder": options.encoder,
        "kvae_vae": Path(name).name,
        MADE_HERE: sha256_of(vae),
        "kvae_adapter": Path(adapter).name,
        "kvae_adapter_sha256": sha256_of(adapter) if adapter else "",
    }


def nabla_size(height: int, width: int) -> tuple[int, int]:
    """The sides, rounded up to what Kandinsky 5's sparse attention needs."""
    return -(-height // NABLA) * NABLA, -(-width // NABLA) * NABLA


def pixels(frames: Sequence[np.ndarray], height: int, width: int) -> Tensor:
    """Frames → [1, 3, T, height, width] in −1..1, float32, stretched bilinearly if they have another size."""
    x_T3HW = to_unit(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), HUNYUAN_HALF_RANGE)
    if x_T3HW.shape[2:] != (height, width):
        x_T3HW = F.interpolate(x_T3HW, (height, width), mode="bilinear", align_corners=False)
    return x_T3HW.permute(1, 0, 2, 3)[None]
