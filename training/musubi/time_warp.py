"""Whether caches of Kandinsky 5 are warped in time, seen in a clip that is decoded and compared with its video.

musubi-tuner's own VAE for Kandinsky 5 encodes in tiles of 25 frames, 18 apart, and keeps 5 latents, 20 frames, of each.
The first of the 5 is replaced by the last of the tile before, as tiles are blended over one latent. So latents 0 … 6
are right, latents 7 … 11 hold the frames 2 before their own, latents 12 … 16 those 4 before, and so on. Clips of 29 to
37 frames have the right number of latents all the same.

# x pixels of the video, y decoded pixels, both [1, 3, T, H, W] in −1..1
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.spaces import LatentSpace
from ...kvae.errors import WeightsError
from ...kvae.pixels import HUNYUAN_HALF_RANGE, to_unit
from ...serving.architectures import Architecture
from ...serving.latent_files import load_latent
from ..errors import UserError
from ..served import dtype_of, load_served
from ..vaes import load_hunyuan_vae
from .cache_faults import CacheFile, Fault, is_kandinsky
from .cache_files import MADE_HERE
from .encoders import HUNYUAN, EncoderOptions, pixels
from .frames import read_windows
from .plan import Plan
from .value_faults import Values
from .windows import Window

LEAST_FRAMES = 29
LATENTS, SIDE = 12, 32  # latents in time, and rows and columns, that are decoded at most
FIRST_LATE, TILE_LATENTS, LAG = 7, 5, 2
SURE = 0.1  # of what changes within LAG frames; real clips reach 0.25 to 0.6, as blur lessens it
TRIES = 3  # clips

Decoder = Callable[[Tensor], Tensor]  # raw latents [1, c, t, h, w] → y


def find_warped(
    values: list[Values], plans: dict[Architecture, Plan], options: EncoderOptions | None
) -> tuple[list[Fault], str]:
    """Decode the clip that moves most, and say of all caches of its kind what it shows.

    Args:
        values: of caches in which no fault was found.
        options: what to decode with, if anything.

    Returns:
        the faults, and a note of what could not be checked, or "".
    """
    suspects = [each for each in values if _may_be_warped(each.file)]
    if not suspects:
        return [], ""
    if not plans or options is None:
        return [], (
            f"not checked: whether {len(suspects)} caches of {LEAST_FRAMES} frames or more are warped in time, as "
            "musubi-tuner's own are; that needs --dataset-config, and --hunyuan-vae or --encoder kvae"
        )
    (plan,) = [plan for architecture, plan in plans.items() if is_kandinsky(architecture)]
    decode = load_decoder(options, suspects[0].file.architecture.space)
    known = [
        each.file
        for each in sorted(suspects, key=lambda each: -each.motion)
        if _path_in(plan, each.file) in plan.targets
    ]
    for file in known[:TRIES]:
        with suppress(UserError, WeightsError):  # of a video that cannot be read
            warped = is_warped(file, plan, decode)
            if warped is not None:
                found = f"warped in time: {file.path.name} shows earlier frames from latent {FIRST_LATE} on"
                return [each.file.fault(found, "each latent at its own frames") for each in suspects if warped], ""
    return [], "not checked: a warp in time, as the clips that move most move too little or cannot be read"


def _may_be_warped(file: CacheFile) -> bool:
    long = file.name.frames is not None and file.name.frames >= LEAST_FRAMES
    return is_kandinsky(file.architecture) and long and MADE_HERE not in file.header.metadata


def load_decoder(options: EncoderOptions, space: LatentSpace) -> Decoder:
    """Load what decodes latents of a space: HunyuanVideo's VAE, or a KVAE with an adapter.

    Raises:
        UserError: an adapter is missing.
        WeightsError: a file is not what it should be.
    """
    if options.encoder != HUNYUAN:
        host = load_served(options, space.name, ("decode",))
        return lambda z: host.decode(z.to(options.device))
    vae = load_hunyuan_vae(options.hunyuan_vae, options.device, dtype_of(options))
    return lambda z: to_unit(vae.decode(z), HUNYUAN_HALF_RANGE)


@torch.inference_mode()
def is_warped(file: CacheFile, plan: Plan, decode: Decoder) -> bool | None:
    """Whether the cache of an item holds earlier frames than it should. None: the clip moves too little to tell.

    Raises:
        UserError: the video cannot be read.
        WeightsError: the cache or the video cannot be read.
    """
    z, side = load_latent(file.path).z[:, :, :LATENTS].float(), file.architecture.space.spatial_factor
    count = file.architecture.space.temporal_factor * (z.shape[2] - 1) + 1
    target = plan.targets[_path_in(plan, file)]
    window = Window(file.name.start, count)
    ((_, frames),) = read_windows(target.item.path, plan.positions[target.item], [window], target.bucket)
    x = pixels(frames, z.shape[3] * side, z.shape[4] * side)
    lag = lateness(decode(_middle(z, SIDE)).cpu(), _middle(x, SIDE * side))
    return None if abs(lag) < SURE else lag > 0


def _path_in(plan: Plan, file: CacheFile) -> Path:
    """The path by which a plan would know a cache."""
    return Path(plan.dataset.cache_directory, file.path.name)


def _middle(x: Tensor, side: int) -> Tensor:
    """The middle of a picture [..., H, W], of at most this many rows and columns."""
    top, left = (max(0, each - side) // 2 for each in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


def lateness(y: Tensor, x: Tensor) -> float:
    """How y follows x: about −1 if its frames are those of x, about 1 if they are the earlier ones of warped latents.

    The error of the decoder cancels out, as it adds the same to both distances. 0 if nothing moves.
    """
    own = torch.arange(4 * FIRST_LATE - 3, x.shape[2])
    latent = (own + 3) // 4
    warped = own - LAG * ((latent - FIRST_LATE) // TILE_LATENTS + 1)
    change = (x[:, :, own] - x[:, :, warped]).square().mean().item()
    if change == 0:
        return 0.0
    ahead = (y[:, :, own] - x[:, :, own]).square().mean() - (y[:, :, own] - x[:, :, warped]).square().mean()
    return ahead.item() / change
