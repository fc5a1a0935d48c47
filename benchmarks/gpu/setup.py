"""What is measured: the device, the sizes, the time that each section may take, and the figures for the goals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from kvae_comfyui.kvae import FAMILY, KVAEConfig

Size = tuple[int, int, int]  # frames, height, width

WIDTHS = (32, 32, 64, 64)
TINY_FAMILY = {
    "1.0": KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1),
    "2.0-t4s8": KVAEConfig((8, 8, 16, 16), (8, 8, 16, 16), num_res_blocks=1, norm="rms", downsample_version=2),
    "2.0-t4s16": KVAEConfig(
        (4, 8, 8, 16, 16),
        (4, 16, 16, 16, 32),
        num_res_blocks=1,
        z_channels=64,
        temporal_start_level=1,
        norm="rms",
        downsample_version=2,
        padding="zeros",
    ),
}
SHARES = {"1.0": 45, "2.0": 60, "peaks": 60, "ladder": 90, "comfyui": 75, "extraction": 20}
TINY_HUNYUAN = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}


@dataclass
class Setup:
    """The settings of a report. The defaults are those for a card.

    Attributes:
        sizes: of the clips that are timed.
        plan_steps: by size of a clip, how far apart the plans are that are compared with the measured peak: see
            `benchmarks.frontier`.
        free: GB that the process may use, from the largest card to the smallest; None: all of the card.
        row_seconds: for the turns of one row of a table, after the first.
        shares: seconds within which a section begins what it measures.
        figures: what the sections have measured, by the name of the goal. Every figure must meet the goal.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    family: dict[str, KVAEConfig] = field(default_factory=lambda: dict(FAMILY))
    hunyuan: dict = field(default_factory=dict)
    sizes: tuple[Size, ...] = ((33, 480, 832), (33, 720, 1280))
    plan_steps: dict[Size, float] = field(
        default_factory=lambda: {(17, 512, 512): 0.9, (33, 480, 832): 0.7, (33, 720, 1280): 0.5}
    )
    ladder_size: Size = (33, 720, 1280)
    free: tuple[float | None, ...] = (None, 24.0, 16.0, 12.0, 8.0)
    row_seconds: float = 12
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    pairs: int = 256
    pair_shape: tuple[int, ...] = (16, 9, 30, 40)
    epochs: int = 5
    clips: int = 8
    clip_size: Size = (33, 240, 320)
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def tiny(self) -> bool:
        return self.device.type == "cpu"


def card_setup() -> Setup:
    """Models and clips of full size, and limits that the card is large enough for."""
    total = torch.cuda.get_device_properties(0).total_memory
    setup = Setup(torch.device("cuda"))
    setup.free = tuple(each for each in setup.free if each is None or 1e9 * each < total)
    return setup


def tiny_setup() -> Setup:
    """Small models and clips on the CPU: every section runs, and no figure means anything."""
    return Setup(
        torch.device("cpu"),
        family=TINY_FAMILY,
        hunyuan=TINY_HUNYUAN,
        sizes=((21, 32, 48),),
        plan_steps={(21, 32, 48): 0.7},
        ladder_size=(9, 64, 64),
        free=(None,),
        row_seconds=0,
        shares=dict.fromkeys(SHARES, 3600),
        pairs=24,
        pair_shape=(16, 3, 8, 8),
        epochs=2,
        clips=2,
        clip_size=(9, 32, 48),
    )


def shape_text(size: Size) -> str:
    """33x720x1280"""
    return "x".join(map(str, size))
