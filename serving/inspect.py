"""What a latent is, as text: the report of Inspect Latent, of Load Latent from File and of the command `inspect`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.checks import check_values, latent_kind
from ..adapters.spaces import LatentSpace, fitting_spaces
from ..adapters.weights import VAEWeights, in_words
from .latent_files import LatentFile
from .likely_space import Ranking, likely, state_within
from .noise import noise_in

LIKELY = 0.8  # the odds from which on a guess is called likely; `benchmarks.which` measures how often those are wrong
SHOWN = 0.05  # of the other guesses


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
        lines += _verdict(z, spaces, std, known, weights)
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
    std = values.std(correction=0).item() if values.min() < values.max() else 0.0  # not what a sum's rounding leaves
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


def _verdict(
    z: Tensor, spaces: list[LatentSpace], std: float, known: str | None, weights: VAEWeights | None
) -> list[str]:
    if std == 0:
        return ["All values are equal: this is an empty latent, not sampled yet."]
    noise = [found] if (found := noise_in(z)) else []
    if known:
        named = [f"It is of {in_words(known, weights)}."] if weights else []
        return [f"Space: {known} (known, not guessed from the shape alone).", *named, *noise]
    if noise:  # whose statistics are those of no VAE
        return noise
    ranked = likely(z) if z.ndim == 5 else []
    lines = [_raw_or_scaled(space, ranked) for space in spaces if space.raw_deviation and ranked]
    if ranked:
        lines.append(_guess(ranked))
        lines.append(
            "Only the node that made the latent knows; to settle it, decode a few frames with the VAE of each."
        )
    return lines


def _raw_or_scaled(space: LatentSpace, ranked: Ranking) -> str:
    state, odds = state_within(ranked, space)
    return (
        f"If it is {space.name}, it looks {state} ({_percent(odds)}): raw latents of that space have a standard "
        f"deviation of about {space.raw_deviation:.2f}, scaled ones of about 1."
    )


def _guess(ranked: Ranking) -> str:
    """What the channels say. Less than LIKELY is no verdict."""
    (best, odds), *_ = ranked
    if odds >= LIKELY:
        rest = f" {best.basis}." if not best.mean else ""
        return f"By the means and deviations of its channels it is likely {best}, {_percent(odds)}.{rest}"
    shown = [f"{each} {_percent(p)}" for each, p in ranked if p >= SHOWN]
    return f"The means and deviations of its channels do not tell which: {'; '.join(shown)}."


def _percent(odds: float) -> str:
    return f"{min(max(round(100 * odds), 1), 99)} %"  # never certain
