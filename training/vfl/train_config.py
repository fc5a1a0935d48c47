"""Options of `vfl-train`, what they mean, and the files that it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..options import DEVICE, KVAE_HELP, MOST_SEED, check_values, option
from ..runtime.places import check_apart
from ..served import AUTO
from .lora import TARGETS
from .path import Steps, band_of, band_of_sigma, sigmas
from .placement import BASE_DTYPES
from .shards import IDENTITY_KEY
from .step import Recipe

NAMES = {"state": "vfl.resume.safetensors", "log": "vfl.jsonl", "settings": "vfl.json"}  # files in the output folder
REPORTS = ("report.html", "report.json")
MOST_STEPS = 1000  # of a path
MOST_FRAMES = 257


@dataclass
class VflTrainConfig:
    base: str = option(..., "image-to-video pipeline of HunyuanVideo 1.5: folder or hub id", metavar="MODEL")
    data_root: str = option(..., "data set, from vfl-pack, with the splits train and val")
    cache_root: str = option(..., "cache of the same data set and prompts, from vfl-cache")
    head: str = option(..., "identity head, from vfl-head or vfl-import-head")
    backbone: str = option(..., "DINOv3 ViT of that head: folder or hub id", metavar="MODEL")
    output_root: str = option(..., "folder for the LoRA, the log and the report", writes="folder")
    prompts: str = option("", "bank of prompts, JSON; without it, the one that comes with the code")
    plan: bool = option(False, "only print what the training would hold in memory")
    frames: int = option(17, "frames of a clip, a multiple of 4 and one more", least=5, most=MOST_FRAMES)
    # the path
    path_steps: int = option(25, "steps from noise to a clip, as many as inference takes", least=2, most=MOST_STEPS)
    rollout_guidance: float = option(
        1.0, "guidance of the teacher's path; above 1, each step takes two passes", least=1, most=100
    )
    harvest: int = option(2, "steps before the deep one at which the student imitates the teacher", least=0)
    harvest_scheme: str = option("bracket", "where these are", choices=("bracket", "random"))
    harvest_jitter: float = option(0.05, "how far they move from their places, as a share of the path", least=0, most=1)
    tail: int = option(1, "such steps after the deep one", least=0)
    identity_band: str = option("0.60-0.85", "where the deep step is, in shares of the path", metavar="LOW-HIGH")
    identity_sigma: str = option("", "the same in noise levels, in place of --identity-band", metavar="LOW-HIGH")
    # the identity loss
    identity_weight: float = option(0.15, "weight λ of the identity loss", least=0)
    appearance_weight: float = option(
        0.0, "weight of the appearance loss: the picture's subject, moved along the base's clip", least=0
    )
    identity_schedule: str = option("linear", "how both weights get there", choices=("constant", "linear", "cosine"))
    identity_warmup: int = option(500, "optimiser steps until they are there", least=0)
    identity_every: int = option(1, "both losses are on in every n-th optimiser step", least=1)
    identity_frames: int = option(5, "frames of a clip that the identity loss looks at", least=1)
    p_secondary: float = option(0.1, "probability of another picture of the identity as its anchor", least=0, most=1)
    decode_scale: float = option(0.5, "size of the decoded picture, as a share of the clip's", above=0, most=1)
    decode_latents: int = option(0, "decode only the first n latents of a clip, 4n − 3 frames; 0 for all", least=0)
    kvae: str = option("", f"{KVAE_HELP}; decodes in the place of the pipeline's VAE", metavar="VAE")
    adapter_h2k: str = option("", "adapter hunyuan_video_1.5 → that KVAE's latents")
    second_backbone: str = option(
        "", "another DINOv3, by which validation judges too; without it, the first one without head", metavar="MODEL"
    )
    # the LoRA
    targets: str = option("published", "layers that get a LoRA", choices=tuple(TARGETS))
    rank: int = option(16, "rank of the LoRA", least=1, most=1024)
    alpha: float = option(16.0, "its changes are scaled by alpha / rank", above=0)
    start_from: str = option("", "LoRA of any format to start from, in place of --targets, --rank and --alpha")
    # the optimiser
    optimiser: str = option("muon", "how the gradient is used", choices=("muon", "adamw"))
    steps: int = option(10_000, "optimiser steps", least=1)
    batch: int = option(1, "samples of a step, over all processes", least=1, most=4096)
    lr: float = option(1e-4, "peak learning rate; half a cosine down to zero", above=0)
    warmup: int = option(500, "steps until the learning rate is there", least=1)
    weight_decay: float = option(0.01, "weight decay", least=0)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    # memory
    base_dtype: str = option(
        AUTO, "how the base is stored; auto is bf16 on a GPU, else fp32", choices=(AUTO, *BASE_DTYPES)
    )
    offload: bool = option(False, "keep the base's blocks in host memory; each visits the device when it runs")
    shard: bool = option(False, "each process holds one part of the base")
    # validation
    val_every: int = option(1000, "steps from one validation, and its files, to the next", least=1)
    val_samples: int = option(4, "clips to validate on", least=1, most=1024)
    identity_key: str = option(IDENTITY_KEY, "key of the identity in a sample's JSON, and its column", metavar="KEY")
    seed: int = option(0, "seed of the LoRA and of the samples", least=0, most=MOST_SEED)
    device: str = option(DEVICE, "device to train on", metavar="DEVICE")


@dataclass
class Progress:
    """What a training counts in addition to its steps. The fields are the names in the state file.

    Attributes:
        validated: step of the last validation.
        sums: since the last row of the log: distillation, flow, identity and appearance, samples, samples that were
            looked at, norms of the gradient.
        rows: of the log.
        first, last: figures of the first and of the last validation.
    """

    validated: int = -1
    sums: tuple[float, ...] = (0.0,) * 7
    rows: int = 0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def check(self, step: int, every: int) -> None:
        """Raise ValueError unless a training can have this progress after `step` steps."""
        if not (0 <= self.validated <= step <= self.validated + every and self.rows > 0 and len(self.sums) == 7):
            raise ValueError(f"validated at step {self.validated} of {step}, {self.rows} rows in the log")
        if not all("drift" in each for each in (self.first, self.last)):
            raise ValueError("figures without a drift")


def check_config(config: VflTrainConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: an option is out of range, or does not go with another.
    """
    check_values(config)
    if config.frames % 4 != 1:
        near = config.frames // 4 * 4 + 1
        raise UserError(f"--frames is {config.frames}; expected a multiple of 4 and one more, such as {near}")
    if config.shard and (config.offload or config.base_dtype == "fp8"):
        raise UserError("--shard goes with a whole bf16 or fp32 base; leave --offload and --base-dtype fp8 out")
    if config.adapter_h2k and not config.kvae:
        raise UserError("--adapter-h2k is given without --kvae; name the KVAE that decodes")
    most = (config.frames - 1) // 4 + 1
    if config.decode_latents > most:
        raise UserError(f"--decode-latents is {config.decode_latents}; a clip of {config.frames} frames has {most}")
    check_apart({name: Path(config.output_root) / name for name in (*NAMES.values(), *REPORTS)})


def recipe_of(config: VflTrainConfig, shift: float) -> Recipe:
    """What the LoRA learns from.

    Args:
        shift: of the base's noise levels.

    Raises:
        UserError: the band of the deep step is none, or no step is in it.
    """
    sigma = sigmas(config.path_steps, shift)
    if config.identity_sigma:
        band = band_of_sigma(sigma, *parse_range("--identity-sigma", config.identity_sigma))
    else:
        band = band_of(config.path_steps, *parse_range("--identity-band", config.identity_band))
    law = Steps(config.harvest, config.harvest_scheme, config.harvest_jitter, config.tail)
    weight = config.identity_weight or config.appearance_weight  # what looks at the clip is a share of it
    return Recipe(sigma, law, band, weight, config.identity_schedule, config.identity_warmup, config.identity_every)


def parse_range(name: str, text: str) -> tuple[float, float]:
    """Two numbers of 0..1 with a hyphen between them.

    Raises:
        UserError: these are none, or the first is the larger.
    """
    try:
        low, high = map(float, text.split("-"))
        if not 0 <= low <= high <= 1:
            raise ValueError
    except ValueError:
        raise UserError(f"{name} is {text}; expected two numbers from 0 to 1, as 0.60-0.85") from None
    return low, high
