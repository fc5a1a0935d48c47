"""What a training of these settings would hold in memory, from configs alone."""

from __future__ import annotations

from typing import Any

from ...kvae.load import read_config
from ..vaes import weights_file
from .backbone import backbone_config
from .base import load_config, load_shift, load_vae_config
from .plan import Plan, Sizes, passes, plan
from .train_config import VflTrainConfig, recipe_of


def planned(config: VflTrainConfig, processes: int, shards: int) -> Plan:
    """Count a training.

    Args:
        config: resolved.
        shards: processes that share the base.

    Raises:
        UserError, WeightsError: a config cannot be read, or the base cannot be trained so.
    """
    network, recipe = load_config(config.base), recipe_of(config, load_shift(config.base))
    looks = recipe.weight > 0
    side = network["target_size"]  # all sizes of pictures have the area of this square, or less
    sizes = Sizes(
        config.frames, side, side, config.base_dtype, config.offload, config.targets, config.rank,
        1 if config.optimiser == "muon" else 2, config.decode_latents, config.decode_scale,
        config.identity_frames if config.identity_weight else 0, config.appearance_weight > 0, shards,
    )  # fmt: skip
    decoder: Any = read_config(weights_file(config.kvae, "kvae")) if config.kvae else load_vae_config(config.base)
    work = passes(
        recipe.law, config.path_steps, recipe.band, config.identity_every if looks else 0,
        config.rollout_guidance > 1, config.batch // processes,
    )  # fmt: skip
    return plan(network, sizes, decoder if looks else None, backbone_config(config.backbone), work)
