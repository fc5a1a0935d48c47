"""Which space a latent is likely of, by the mean and the deviation of each of its channels: a guess, with its odds.

Two things are compared. The level is the root mean square of all values. The shape is how the channels differ from each
other. Where the channels' statistics are published, both are compared with them. Where only a scaling factor is, the
level is compared with it, and the channels may be as unlike each other as those of the VAEs whose statistics are known.
Where nothing is, as for KVAE 1.0 and for VAEs that are unknown here, the level may be anything, too. Bayes' rule with
equal odds for all candidates gives the result.

`benchmarks.which` measures the numbers below, and how often the result is wrong.

# C channels; statistics are over B, t, h and w
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.spaces import LatentSpace, fitting_spaces
from .latent_statistics import channel_statistics
from .published_statistics import PUBLISHED

# Of clips about all clips together, measured on the tiny VAEs of this project
LEVEL = -0.02, 0.2  # mean and deviation of the logarithm of the level
SHIFT = 0.4  # of a channel's mean, in deviations of the channel
CHANGE = 0.25  # of the logarithm of a channel's deviation, beside the change in all channels
# A clip that is dark, or flat, moves many channels together: 16 channels, and also 32 or 64, tell as much as 2 to 5
# independent ones.
INDEPENDENT = 4
# Of the channels of a VAE about each other: of Wan 2.1 and 2.2, Mochi, Cosmos 1, Qwen-Image 2 and the tiny VAEs
UNLIKE_MEAN, UNLIKE_STD = 0.4, 0.28
# Of VAEs about each other: mean and deviation of the logarithms of the levels that are published, 0.76 to 4.2
ANY_LEVEL = 0.3, 0.55
CORRELATED = 16  # neighbouring values in a latent that tell as much as one

RAW, SCALED, EITHER = "raw", "scaled", "raw or scaled"
OTHER = "another VAE"


@dataclass(frozen=True)
class Candidate:
    """What a latent may be: of `spaces`, between which nothing that is published decides, and raw or scaled.

    Attributes:
        level: the root mean square of all values; None if nothing is published of it.
        mean, std: of each channel, if they are published.
    """

    spaces: str
    state: str
    level: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.state} {self.spaces}" if self.state else self.spaces

    @property
    def basis(self) -> str:
        """What a comparison rests on where nothing is published of single channels, as a sentence without a dot."""
        if self.level is None:
            return "Nothing is published of its statistics, so this only says that no other candidate fits"
        return "Nothing is published of its single channels, so this rests on the size of all values alone"


Ranking = list[tuple[Candidate, float]]  # candidates with their probabilities, the most likely first


def candidates(channels: int) -> list[Candidate]:
    """All that latents of so many channels may be, as far as this project knows."""
    found, nameless = list[Candidate](), list[str]()
    for space in fitting_spaces((1, channels, 1, 1, 1)):
        if space.scaling_factor is None:
            nameless.append(space.name)
        elif space.raw_deviation is None:  # the factor is too near to 1
            found.append(Candidate(space.name, EITHER, 1.0))
        else:
            found.append(Candidate(space.name, RAW, space.raw_deviation))
            found.append(Candidate(space.name, SCALED, 1.0))
    found.append(Candidate(" or ".join([*nameless, OTHER]), ""))
    published = [each for each in PUBLISHED if each.channels == channels]
    for each in published:
        squares = sum(mean**2 + std**2 for mean, std in zip(each.mean, each.std, strict=True))
        found.append(Candidate(each.name, RAW, math.sqrt(squares / channels), each.mean, each.std))
    if published:  # all of them are scaled channel by channel
        names = " or ".join(each.name for each in published)
        found.append(Candidate(names, SCALED, 1.0, (0.0,) * channels, (1.0,) * channels))
    return found


def likely(z_Bcthw: Tensor) -> Ranking:
    """The candidates for a latent.

    Empty if nothing but OTHER is known of so many channels, or if a channel does not vary, or holds values that are not
    finite.
    """
    found = candidates(z_Bcthw.shape[1])
    mean_C, std_C = (each.double() for each in channel_statistics(z_Bcthw))
    if len(found) == 1 or not ((std_C > 0) & std_C.isfinite() & mean_C.isfinite()).all():
        return []
    noise = CORRELATED * len(mean_C) / z_Bcthw.numel()
    logs = [_log_likelihood(mean_C, std_C, each, noise) for each in found]
    odds = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
    return sorted(zip(found, odds, strict=True), key=lambda each: -each[1])


def state_within(ranked: Ranking, space: LatentSpace) -> tuple[str, float]:
    """Whether a latent is raw or scaled if it is of this space, which has a `raw_deviation`; and the probability."""
    (likelier, p), (_, q) = [each for each in ranked if each[0].spaces == space.name]
    return likelier.state, p / (p + q) if p else 0.5


def _log_likelihood(mean_C: Tensor, std_C: Tensor, candidate: Candidate, noise: float) -> float:
    """The logarithm of the density of a clip's statistics.

    Args:
        noise: the variance of a channel's mean, in squared deviations, because the clip has few values.
    """
    level = (mean_C.square() + std_C.square()).mean().sqrt().log()
    middle, spread = LEVEL[0], LEVEL[1] ** 2 + noise / len(mean_C)
    if candidate.level is None:
        middle, spread = middle + ANY_LEVEL[0], spread + ANY_LEVEL[1] ** 2
    else:
        middle += math.log(candidate.level)
    if candidate.mean:
        center_C, scale_C = (torch.tensor(each, dtype=torch.float64) for each in (candidate.mean, candidate.std))
        shift, change = SHIFT**2, CHANGE**2
    else:  # compared with its own level
        center_C, scale_C = torch.zeros_like(mean_C), level.exp().expand_as(mean_C)
        shift, change = SHIFT**2 + UNLIKE_MEAN**2, CHANGE**2 + UNLIKE_STD**2
    means_C = _normal((mean_C - center_C) / scale_C, shift + noise) - scale_C.log()
    changes_C = std_C.log() - scale_C.log()
    shape_C = means_C + _normal(changes_C - changes_C.mean(), change + noise / 2)
    return (INDEPENDENT * shape_C.mean() + _normal(level - middle, spread)).item()


def _normal(x: Tensor, variance: float) -> Tensor:
    """The logarithm of the normal density around 0, elementwise."""
    return -0.5 * (x.square() / variance + math.log(2 * math.pi * variance))
