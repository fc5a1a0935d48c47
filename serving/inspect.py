"""What a latent is, as text: the report of Inspect Latent, of Load Latent from File and of the command `inspect`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.checks import check_values, latent_kind
from ..adapters.spaces import LatentSpace, fitting_spaces
from ..adapters.weights import VAEWeights, in_words
from .latent_files import LatentFile
from .latent_statistics import CERTAIN_CORRELATION, wan_correlation


def describe_file(found: LatentFile) -> str:
    """Report how a latent file was read, and what `describe` says of its latent, one line each.

    Raises:
        ValueError: as `describe`.
    """
    frames = f" The clip had {_count(found.frames, 'frame')}." if found.frames else ""
    latent = describe(found.z, found.space, found.others, found.weights)
    return "\n".join([f"Read as a {found.kind}.{frames}", latent, *found.extras.about()])


def describe(
    z: Tensor, known: str | None = None, others: Sequence[Tensor] = (), weights: VAEWeights | None = None
) -> str:
    """Report shape, decoded size, statistics and likely space of a latent, one line each.

    Args:
        known: the name of the latent's space, if it is known.
        others: the parts that come with z in one latent, such as audio.
        weights: of the VAE that the latent is of, if known.

    Raises:
        ValueError: a part is not a dense float tensor, or is on the meta device.
    """
    check_values(z)
    spaces = [space for space in fitting_spaces(z.shape) if known in (None, space.name)]
    kind = f"a latent of {known}, {list(z.shape)}" if known else latent_kind(z.shape)
    lines = [f"This is {kind}, {_stored(z)}.", *_decoded(z.shape, spaces)]
    statistics, std = _statistics(z)
    lines += statistics
    if std is not None:
        lines += _verdict(z, spaces, std, known)
        if known and weights and std:
            lines.append(f"It is of {in_words(known, weights)}.")
    for n, part in enumerate(others, 2):
        lines += _part(n, part, of_video=z.ndim == 5)
    return "\n".join(lines)


def _part(n: int, z: Tensor, of_video: bool) -> list[str]:
    """What comes with a video in one latent is its audio; of other parts only the model knows what they are."""
    check_values(z)
    audio = of_video and n == 2
    kind = "audio" if audio else f"a part {n}"
    decoder = " The model's audio VAE decodes it, not a video VAE." if audio else ""
    statistics, std = _statistics(z)
    empty = ["All values are equal: this part is empty, not sampled yet."] if std == 0 else []
    return [f"With it comes {kind}, {list(z.shape)}, {_stored(z)}.{decoder}", *statistics, *empty]


def _stored(z: Tensor) -> str:
    return f"{str(z.dtype).removeprefix('torch.')} on {z.device}"


def _statistics(z: Tensor) -> tuple[list[str], float | None]:
    """Lines on the values, and their standard deviation; None if no value is finite."""
    values = z.float()
    finite = torch.isfinite(values)
    if not finite.any():
        return ["It holds no finite value: the sampler failed, or nothing was sampled."], None
    lines = []
    if not finite.all():
        lines.append(f"{int((~finite).sum())} of {z.numel()} values are NaN or infinite: the sampler failed.")
    values = values[finite]
    std = values.std(correction=0).item()
    lines.append(
        f"Mean {values.mean():.3f}, standard deviation {std:.3f}, from {values.min():.3f} to {values.max():.3f}."
    )
    return lines, std


def _decoded(shape: Sequence[int], spaces: list[LatentSpace]) -> list[str]:
    """What the latent decodes to in each of the spaces; equal lines once."""
    lines = []
    for space in spaces:
        B, _, T, H, W = space.decoded_shape(shape)
        lines.append(f"It decodes to {_count(T, 'frame')} of {W} x {H} pixels, {_count(B, 'clip')}.")
    return list(dict.fromkeys(lines))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _verdict(z: Tensor, spaces: list[LatentSpace], std: float, known: str | None) -> list[str]:
    if std == 0:
        return ["All values are equal: this is an empty latent, not sampled yet."]
    if known:
        return [f"Space: {known} (known, not guessed from the shape alone)."]
    lines = []
    for space in spaces:
        if raw := space.raw_deviation:
            state = "raw" if abs(std - raw) < abs(std - 1) else "scaled"
            lines.append(
                f"If it is {space.name}, it looks {state}: raw latents of that space have a standard deviation of "
                f"about {raw:.2f}, scaled ones of about 1."
            )
    if len(spaces) > 1:
        lines += [_compared_with_wan(z), "Only the node that made the latent knows which of these spaces it is of."]
    return lines


def _compared_with_wan(z: Tensor) -> str:
    """How the channels compare with the only published statistics of single channels."""
    means, deviations = wan_correlation(z)
    certain = min(means, deviations) > CERTAIN_CORRELATION
    return (
        f"The means and deviations of its channels are {'' if certain else 'not '}those of a raw Wan 2.1 latent "
        f"(correlation {means:.2f} and {deviations:.2f})."
    )
