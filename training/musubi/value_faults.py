"""What only the values of a cache show: NaN, a wrong scale, copies of latents that differ.

A single clip says little of the scale, as clips differ much from the average of their space. Many clips together say
more: the scaling factor is the inverse of the standard deviation of raw latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kvae import WeightsError
from ...kvae.files import Weights
from ...kvae.finite import all_finite
from ...serving.architectures import Architecture
from ...serving.latent_statistics import SCALED, UNSCALED_TWICE, WAN, wrong_kind
from .cache_faults import CacheFile, Fault, base_of, unreadable
from .cache_files import DTYPES, MADE_HERE

MANY = 8  # caches, from which on their deviation tells the scale
NEAR = 1.25  # the deviation of many clips is within this factor of the wrong one, about 2.1 times the right one


@dataclass(frozen=True)
class Values:
    """What is kept of a cache's values.

    Attributes:
        deviation: the standard deviation of its latents, as they are stored.
        motion: the mean absolute difference between latents that follow each other.
    """

    file: CacheFile
    deviation: float
    motion: float


def read_values(file: CacheFile) -> tuple[Values | None, list[Fault]]:
    """Read a cache whose header is in order, and check what can be told from it alone."""
    try:
        weights = Weights(file.path)
        tensors = {base_of(key): weights[key] for key in weights.shapes}
    except (WeightsError, OSError) as error:
        return None, [unreadable(file.path, WeightsError(str(error)))]
    faults = [*_dtype_faults(file, tensors), *_finite_faults(file, tensors)]
    if faults:
        return None, faults
    z = tensors["latents"].float()
    faults += _copy_faults(file, tensors)
    values = Values(file, z.std(correction=0).item(), z.diff(dim=1).abs().mean().item() if z.shape[1] > 1 else 0.0)
    if values.deviation == 0:
        faults.append(file.fault("all its latents are equal", "latents of a picture"))
    elif MADE_HERE not in file.header.metadata:
        faults += _certain_scale(file, z)
    return values, faults


def _dtype_faults(file: CacheFile, tensors: dict[str, Tensor]) -> Iterator[Fault]:
    for key in file.header.shapes:
        found = str(tensors[base_of(key)].dtype).removeprefix("torch.")
        if base_of(key) != key and not key.endswith(f"_{found}"):
            yield file.fault(f"{key} is of {found}", f"one of {', '.join(DTYPES)}, as in its key")


def _finite_faults(file: CacheFile, tensors: dict[str, Tensor]) -> Iterator[Fault]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            yield file.fault(f"{count} of {tensor.numel()} values of {name} are NaN or infinite", "numbers")


def _copy_faults(file: CacheFile, tensors: dict[str, Tensor]) -> Iterator[Fault]:
    """Tensors that repeat others: the first and the last latent, or zeros and ones around the first frame."""
    image = tensors.get("latents_image")
    if image is None:
        return
    if file.architecture.ends:
        if not torch.equal(image, tensors["latents"][:, [0, -1]]):
            yield file.fault("latents_image differs from the first and the last of its latents", "copies of them")
        return
    mask = torch.zeros_like(image[-1])
    mask[0] = 1
    if not torch.equal(image[-1], mask) or image[:, 1:].any():
        yield file.fault("latents_image is not the first frame and its mask", "a mask of 1, then zeros, after frame 0")


def _certain_scale(file: CacheFile, z_cthw: Tensor) -> Iterator[Fault]:
    """What no clip of the space can be expected to show."""
    space = file.architecture.space
    kind, _ = wrong_kind((space.unscale(z_cthw) if file.architecture.scaled else z_cthw)[None], space)
    found = f"its latents have a standard deviation of {z_cthw.std(correction=0).item():.2f}"
    if kind == WAN:
        yield file.fault("its channels have the means and deviations of Wan 2.1", f"latents of {space.name}")
    elif kind == SCALED:
        said = "scaled twice" if file.architecture.scaled else "scaled ones"
        yield file.fault(f"{found}: {said}", _right(file.architecture))
    elif kind == UNSCALED_TWICE:
        said = "raw ones" if file.architecture.scaled else "raw ones, unscaled once more"
        yield file.fault(f"{found}: {said}", _right(file.architecture))


def scale_faults(values: list[Values]) -> Iterator[Fault]:
    """Caches of one architecture that all together have the deviation of the wrong scale."""
    for architecture in {each.file.architecture for each in values}:
        known = [each for each in values if each.file.architecture == architecture]
        known = [each for each in known if MADE_HERE not in each.file.header.metadata]
        raw = architecture.space.raw_deviation
        if len(known) < MANY or raw is None:
            continue
        pooled = math.sqrt(sum(each.deviation**2 for each in known) / len(known))
        wrong = raw if architecture.scaled else 1.0
        if wrong / NEAR < pooled < wrong * NEAR:
            kind = "raw" if architecture.scaled else "scaled"
            found = f"{kind} latents: the caches here have a standard deviation of {pooled:.2f}"
            for each in known:
                yield each.file.fault(found, _right(architecture))


def _right(architecture: Architecture) -> str:
    raw = architecture.space.raw_deviation
    return "scaled latents, of about 1.00" if architecture.scaled else f"raw latents, of about {raw:.2f}"
