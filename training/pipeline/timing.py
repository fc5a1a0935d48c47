"""What one clip costs on this machine: a minute of the real work, in a folder that is deleted again."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ...adapters.shuffle import on_one_grid
from ..adapters.closed_form import fit_both_ways
from ..adapters.config import TrainConfig
from ..adapters.recipe import crop_radius, recipe_of
from ..data.dataset import Pairs, open_pairs, spread
from ..data.extract import ExtractConfig, Extraction, prepare
from ..data.packing import PackConfig, run_pack
from ..data.pairs import pairs_under
from ..errors import UserError
from ..runtime.processes import Processes

SECONDS = 60  # of extraction
MOST_CLIPS = 64


@dataclass(frozen=True)
class Timing:
    """Costs of one clip in one process; seconds, except where it says bytes.

    Attributes:
        clips: that were timed.
        encode: decoding the video, both VAEs' encoders, and writing the pair.
        pack: into a shard.
        fit: the closed form of both directions.
        step: its share of a training step, forward and backward.
        validate: both adapters over the whole clip.
        pixels: all decodes that `evaluate` makes of it.
        pair_bytes, shard_bytes: of its pair in a file and in a shard.
        memory: most bytes that were used, of the GPU, or of this process where there is none; 0 if unknown.
    """

    clips: int
    encode: float
    pack: float
    fit: float
    step: float
    validate: float
    pixels: float
    pair_bytes: float
    shard_bytes: float
    memory: int


def measure(config: ExtractConfig, videos: list[Path], processes: Processes) -> Timing:
    """Time all stages on a few clips. Every process calls this, and times its own.

    Args:
        config: of the extraction that is planned.

    Raises:
        UserError, WeightsError: as `extract.run`.
    """
    with TemporaryDirectory(prefix="kvae-") as folder:
        pairs, shards = Path(folder, "pairs"), Path(folder, "shards")
        some = [videos[i] for i in spread(len(videos), MOST_CLIPS * processes.count)]
        extraction = prepare(replace(config, output_root=str(pairs)), some, processes)
        encode, clips = _time_extraction(extraction, some[processes.rank :: processes.count] or some[:1])
        if not clips:
            raise UserError(f"{config.videos_root}: none of the first {len(some)} videos gave a pair")
        with redirect_stdout(io.StringIO()):
            pack = _clock(lambda: run_pack(PackConfig(str(pairs), str(shards))))
        adapters = _time_adapters(open_pairs(shards), str(processes.device))
        pixels = _time_decodes(extraction, open_pairs(shards), processes.device) + 2 * encode
        sizes = [sum(path.stat().st_size for path in files) for files in (pairs_under(pairs), shards.iterdir())]
    return Timing(
        clips, encode, pack / clips, *adapters, pixels, sizes[0] / clips, sizes[1] / clips,
        peak_memory(processes.device),
    )  # fmt: skip


def _time_extraction(extraction: Extraction, videos: list[Path]) -> tuple[float, int]:
    """Seconds of a clip, and the number of clips: a batch to warm up, then as many as a minute takes."""
    size = extraction.config.batch_size
    first, rest = [(video, 1) for video in videos[:size]], [(video, 1) for video in videos[size:]]
    seconds = _clock(lambda: extraction.run(first))
    warm = clips = extraction.counts["extracted"]
    some = rest[: max(size, int(SECONDS / max(seconds, 1e-3) * len(first)))]
    if some:
        seconds = _clock(lambda: extraction.run(some)) or seconds
        clips = extraction.counts["extracted"]
    return seconds / max(1, clips - warm if clips > warm else warm), clips


def _time_adapters(pairs: Pairs, device: str) -> tuple[float, float, float]:
    """Seconds of a clip in the closed form, in a training step and in the validation."""
    settings = TrainConfig("")
    recipe = replace(recipe_of(settings.network), closed_form=False)  # a few clips may be too few for it
    fitting = time.perf_counter()
    fits = fit_both_ways(pairs, device)
    fit = (time.perf_counter() - fitting) / len(pairs)
    networks = {name: network.to(device) for name, network in recipe.networks(settings.network, fits).items()}
    radius = crop_radius(networks)
    batch = max(pairs.groups(radius).values(), key=len)[: settings.batch_size]

    def step() -> float:
        crops = pairs.crops(batch, radius, 0, 0, torch.device(device))
        loss = torch.stack(list(recipe.loss(networks, *crops).values())).sum()
        loss.backward()
        return loss.item()

    @torch.inference_mode()
    def validate() -> float:
        z_h, z_k = on_one_grid(*pairs.batch([0], torch.device(device)))
        return (networks["h2k"](z_h).sum() + networks["k2h"](z_k).sum()).item()

    return fit, _second(step) / len(batch), _second(validate)


def _time_decodes(extraction: Extraction, pairs: Pairs, device: torch.device) -> float:
    """Seconds of the eight decodes of a clip. `evaluate` makes them in float32."""
    seconds = 0.0
    for vae, z in zip((extraction.hunyuan, extraction.kvae), pairs.batch([0], device), strict=True):
        vae.cast(torch.float32)
        seconds += 4 * _clock(lambda vae=vae, z=z: vae.decode(z).cpu())  # type: ignore[misc]
    return seconds


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has used so far, on CUDA or in the host's memory; 0 if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _second(call: Callable[[], object]) -> float:
    """Seconds of the second call: the first one warms up."""
    call()
    return float(np.min([_clock(call) for _ in range(2)]))


def _clock(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
