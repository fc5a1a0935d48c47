"""The pairs that adapters are trained and validated on, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...adapters.spaces import LatentSpace, grid_ratios
from ..data.dataset import Pairs, open_pairs
from ..data.manifests import read_manifest, read_spaces
from ..directions import DIRECTIONS
from ..errors import UserError
from .config import TrainConfig
from .ridge import Ridge

VAL_PAIRS = 2000
LEAST_VARIANCE = 1e-6  # of latents, relative to their mean square; float16 resolves no less


@dataclass(frozen=True)
class TrainingPairs:
    """Training and validation pairs.

    Attributes:
        spaces: of z_h and of z_k.
        identity: what must be the same for an unfinished training to go on.
    """

    train: Pairs
    val: Pairs
    spaces: tuple[LatentSpace, LatentSpace]
    identity: dict[str, Any]


def open_training_pairs(config: TrainConfig) -> TrainingPairs:
    """Open the pairs of --latent-root and --val-latent-root.

    Raises:
        UserError: a folder holds no pairs, pairs of other spaces, or clips of one video only.
    """
    train, val = split(config)
    spaces = read_spaces(config.latent_root)
    _check_shapes(train, config.latent_root, spaces)
    _check_shapes(val, config.val_latent_root or config.latent_root, spaces)
    identity = {
        "training pairs": {"pairs": len(train), "sha256": train.fingerprint()},
        "validation pairs": {"pairs": len(val), "sha256": val.fingerprint()},
        "VAEs": {key: value for key, value in read_manifest(config.latent_root).items() if key != "settings"},
    }
    return TrainingPairs(train, val, spaces, identity)


def split(config: TrainConfig) -> tuple[Pairs, Pairs]:
    """Training and validation pairs. All clips of a video are on the same side.

    Raises:
        UserError: the two folders hold latents of different spaces, or there is one video only.
    """
    pairs = open_pairs(config.latent_root)
    if config.val_latent_root:
        found = [each.name for each in read_spaces(config.val_latent_root)]
        expected = [each.name for each in read_spaces(config.latent_root)]
        if found != expected:
            raise UserError(
                f"{config.val_latent_root}: pairs of {' and '.join(found)}; expected {' and '.join(expected)}"
            )
        return pairs, open_pairs(config.val_latent_root).spread(VAL_PAIRS)
    of_pair = pairs.videos()
    videos = np.unique(of_pair)
    if len(videos) < 2:
        raise UserError(f"{config.latent_root}: pairs of one video only; none can be held out: give --val-latent-root")
    np.random.default_rng(config.seed).shuffle(videos)
    held_out = np.isin(of_pair, videos[: max(1, len(videos) // 20)])
    return pairs.take(~held_out), pairs.take(held_out).spread(VAL_PAIRS)


def _check_shapes(pairs: Pairs, root: str, spaces: tuple[LatentSpace, LatentSpace]) -> None:
    h, k = spaces
    try:
        ratios = grid_ratios(h, k)
    except ValueError as error:
        raise UserError(f"{root}: {error}") from None
    for shape in pairs.groups(None):
        if (shape.channels_h, shape.channels_k) != (h.channels, k.channels):
            raise UserError(
                f"{root}: holds pairs of {shape.channels_h} and {shape.channels_k} channels; expected {h.channels} "
                f"({h.name}) and {k.channels} ({k.name})"
            )
        if shape.ratios != ratios:
            found, expected = (f"{of_h} to {of_k}" for of_h, of_k in (shape.ratios, ratios))
            raise UserError(
                f"{root}: the rows of z_h and z_k are as {found}; expected {expected}, for {h.name} and {k.name}"
            )


def check_variance(root: str, fits: dict[str, Ridge]) -> None:
    """Refuse latents that are the same everywhere.

    Args:
        fits: the closed-form fits of the pairs in `root`, by direction.

    Raises:
        UserError: they are the same everywhere; the message names the folder and the latents.
    """
    for name, direction in DIRECTIONS.items():
        if fits[name].target_variance() <= LEAST_VARIANCE * fits[name].target_square():
            _, target = direction.ordered("z_h", "z_k")
            raise UserError(f"{root}: {target} is the same everywhere; there is nothing to learn from it")
