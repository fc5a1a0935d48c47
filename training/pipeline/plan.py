"""What a run will take: clips, disk, memory and hours, from a timed minute."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.closed_form import FIT_PAIRS
from ..adapters.training_pairs import VAL_PAIRS
from ..data.clips import clips_of_videos
from ..data.dataset import spread
from ..data.extract import ExtractConfig
from ..errors import UserError
from ..evaluate.config import EvaluateConfig
from ..options import MOST
from ..runtime.processes import Processes
from ..runtime.stages import duration
from .timing import Timing, measure

STAGES = ("extract", "extract the held-out clips", "pack", "train", "evaluate")
SAMPLED = 16  # videos whose windows are counted
OTHER_BYTES = 100e6  # adapters, state, report and pictures


@dataclass(frozen=True)
class Plan:
    """Attributes:
    clips, held_out: to train on and to measure on.
    seconds: of each stage, by its name.
    disk, memory: bytes; memory is that of one process.
    a_second: clips that all processes encode.
    timed: clips in the timing.
    """

    clips: int
    held_out: int
    seconds: dict[str, float]
    disk: float
    memory: int
    a_second: float
    timed: int

    def lines(self, config: ExtractConfig, output: Path, processes: Processes) -> list[str]:
        """What to tell the user before any work."""
        size = f"{config.num_frames}x{config.height}x{config.width}"
        memory = f", {self.memory / 1e9:,.1f} GB of memory at most" if self.memory else ""
        stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
        return [
            f"{self.clips:,} clips of {size} to train on, {self.held_out:,} held out",
            f"{self.a_second:.3g} clips a second through both VAEs, timed on {self.timed}: {processes.device.type}, "
            f"{processes.count} {'process' if processes.count == 1 else 'processes'}{memory}",
            f"{self.disk / 1e9:,.2f} GB of disk, {_free(output) / 1e9:,.2f} GB are free",
            f"{stages}: {duration(sum(self.seconds.values()))} in all",
        ]


def make_plan(
    config: ExtractConfig, train: list[Path], held_out: list[Path], epochs: int, processes: Processes
) -> Plan:
    """Time a few clips, and work out what all of them take.

    Args:
        config: of the extraction of the clips to train on.

    Raises:
        UserError, WeightsError: the VAEs, the videos or the options cannot be used.
    """
    timings = processes.gather(measure(config, train, processes))
    sample = clips_of_videos([train[i] for i in spread(len(train), SAMPLED)], replace(config, max_clips=MOST))
    clips = round(sum(clips for _, clips in sample) / len(sample) * len(train))
    return Plan(
        clips := min(clips, config.max_clips or clips), len(held_out),
        _seconds(timings, clips, len(held_out), epochs),
        (clips + len(held_out)) * (_mean(timings, "pair_bytes") + _mean(timings, "shard_bytes")) + OTHER_BYTES,
        max(each.memory for each in timings), _a_second(timings), sum(each.clips for each in timings),
    )  # fmt: skip


def check_disk(plan: Plan, output: Path) -> None:
    """Refuse a disk that the run would fill.

    Raises:
        UserError: says what is free and what the run needs.
    """
    free = _free(output)
    if plan.disk > free:
        raise UserError(
            f"--output {output}: {free / 1e9:,.2f} GB are free; {plan.clips + plan.held_out:,} clips need "
            f"{plan.disk / 1e9:,.2f} GB; free some space, choose another disk, or give --max-clips"
        )


def _free(output: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    output = output.absolute()
    return shutil.disk_usage(next(each for each in (output, *output.parents) if each.is_dir())).free


def _seconds(timings: list[Timing], clips: int, held_out: int, epochs: int) -> dict[str, float]:
    """Seconds of each stage. Processes share extraction and training; one packs and evaluates."""
    processes = len(timings)
    fit, step, validate = (max(getattr(each, key) for each in timings) for key in ("fit", "step", "validate"))
    fitted, measured = min(clips, FIT_PAIRS), min(held_out, VAL_PAIRS)
    of_epoch = (clips * step + measured * validate) / processes
    pixels = min(held_out, EvaluateConfig.num_pixel_samples)
    seconds = (
        clips / _a_second(timings),
        held_out / _a_second(timings),
        (clips + held_out) * _mean(timings, "pack"),
        fitted * fit / processes + epochs * of_epoch,
        fitted * fit + 3 * measured * validate + pixels * _mean(timings, "pixels"),
    )
    return dict(zip(STAGES, seconds, strict=True))


def _a_second(timings: list[Timing]) -> float:
    return sum(1 / each.encode for each in timings)


def _mean(timings: list[Timing], key: str) -> float:
    return sum(getattr(each, key) for each in timings) / len(timings)
