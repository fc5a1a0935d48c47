"""The precision of both VAEs in an extraction: bfloat16 on CUDA, where it takes half the memory and time of float32 or
less, if it changes latents little enough; float32 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.processes import Processes
from ..vaes import VideoVAE

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cuda",)  # those that bfloat16 is tried on
MOST_ERROR = 0.01  # squared error of bfloat16's latents, as a share of the variance of float32's


def precision_of(asked: str, begun: dict[str, Any], device: torch.device) -> str:
    """A key of DTYPES, or AUTO if a clip must decide.

    Args:
        asked: a key of DTYPES, or AUTO.
        begun: the settings of the pairs that the folder has; empty for a new folder.
    """
    if asked != AUTO:
        return asked
    if begun:  # the pairs of a folder have one precision
        return begun["dtype"] if begun.get("dtype") in tuple(DTYPES) else "float32"
    return AUTO if device.type in DEVICES else "float32"


def bfloat16_errors(frames_B3THW: Tensor, vaes: Sequence[VideoVAE]) -> dict[str, float]:
    """Squared error of bfloat16's latents divided by the variance of float32's, by the name of the space.

    Args:
        frames_B3THW: uint8 clips.
        vaes: in float32; they are in bfloat16 afterwards.
    """
    errors = {}
    for vae in vaes:
        z = vae.encode(frames_B3THW)
        vae.cast(torch.bfloat16)
        errors[vae.space.name] = ((vae.encode(frames_B3THW) - z).square().mean() / z.var()).item()
    return errors


def best_precision(frames_3THW: Tensor | None, vaes: Sequence[VideoVAE], processes: Processes) -> str:
    """Choose bfloat16 or float32 by a clip, and say so. All processes choose what the first one finds.

    Args:
        frames_3THW: uint8; None if no clip can be read.
        vaes: in float32; if bfloat16 is chosen, they are in bfloat16 afterwards.
    """
    errors = {} if frames_3THW is None else bfloat16_errors(frames_3THW[None], vaes)
    errors = processes.gather(errors)[0]
    # NaN is not enough: of latents that are constant, or not finite
    enough = bool(errors) and all(error <= MOST_ERROR for error in errors.values())
    found = ", ".join(f"{error:.3%} of the variance ({space})" for space, error in errors.items())
    dtype = "bfloat16" if enough else "float32"
    processes.say(f"--dtype {dtype}: bfloat16 changes the first clip's latents by {found or 'an unknown amount'}")
    if enough:
        for vae in vaes:
            vae.cast(torch.bfloat16)
    return dtype
