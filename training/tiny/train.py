"""Train one of the embedded small VAEs, for the demo, the tests and the benchmarks.

    python -m training tiny --model kvae --videos-root UCF101 --output tiny_kvae.safetensors --seed 1
    python -m training tiny --model hunyuan --videos-root UCF101 --output tiny_hunyuan.safetensors --seed 2

All have the true architectures. They are trained separately, from different random starts, so that the latent spaces of
a pair (kvae and hunyuan, kvae-t4s16 and hunyuan-1.5) really differ. UCF101's groups g01 to g07 are for validation. What
makes CPU hours go far:
- First a near-linear codec. In the first pair only the skeleton is trained (shortcuts and resamplers, no residual
  branches). HunyuanVideo's learns principal components of 4x8x8 blocks, KVAE finds its own latents, and the branches
  join later, from zero. In the second pair each part is trained alone, beside principal components: see `parts`.
- Biases before the last norms start wide and random, so that a clip's brightness and contrast survive the norms.
- The loss is the mean of log(MSE) over clips, which is PSNR, so easy clips count as much as hard ones.
- Muon trains the convolutions. Small crops come first, larger ones last.
Ctrl-C saves the state, as every hundredth step does. A crash loses the steps since. The same command then continues.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ...kvae.foreign import json_text
from ..errors import UserError
from ..options import DEVICE, MOST_SEED, option
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import add_to_log, keep_rows, read_log
from ..runtime.places import check_apart, check_target
from .components import pca_psnr
from .data import Stage, TrainingClips, parse_stages
from .model import MODELS, build, skeleton
from .parts import PARTS
from .training import TinyTraining

SAVE_STEPS = 100
QUICK_VALIDATION = 6  # every 6th validation clip during the training; all of them at the end
STAGES = "1600x32x4:skeleton,600x32x4,950x64x2,100x128x1"
STAGES_OF_PARTS = (
    "1200x64x2:fine-encoder,1000x128x2:coarse-encoder,1500x128x2:coarse-decoder,2000x128x2:coarse,"
    "500x128x2:level-2,500x64x2:level-1,500x64x2:level-0,1500x64x2"
)


@dataclass
class TinyConfig:
    videos_root: str = option(..., "folder of videos: UCF101, or part of it")
    output: str = option(..., "file to write, NAME.safetensors", writes="file")
    model: str = option("kvae", "VAE to train", choices=tuple(MODELS))
    start_from: str = option("", "file to start from, an earlier --output; without it, random weights")
    stages: str = option(
        "",
        "STEPSxSIDExBATCH[:PART] of each stage: crops of 17xSIDExSIDE; without it, those of the model",
        metavar="STAGES",
    )
    lr: float = option(
        1.5e-3, "peak learning rate; falls linearly to zero over stages that train the same part", above=0
    )
    seed: int = option(0, "seed of the weights and the crops", least=0, most=MOST_SEED)
    bfloat16: bool = option(False, "compute convolutions in bfloat16, which some processors do twice as fast")
    threads: int = option(0, "CPU threads; 0 for PyTorch's choice", least=0, most=1024)
    device: str = option(DEVICE, "device to train on", metavar="DEVICE")


def run(config: TinyConfig) -> int:
    """Train, or resume an unfinished training; returns 0."""
    if config.threads:
        torch.set_num_threads(config.threads)
    side, count = MODELS[config.model]
    stages = parse_stages(config.stages or (STAGES_OF_PARTS if side == 16 else STAGES))
    state_file, log_file = _files(config)
    torch.manual_seed(config.seed)
    _check_stages(stages, config.model)
    vae = build(config.model, config.start_from)
    training = TinyTraining(config, stages, vae)
    training.trainer.resume(state_file, config)
    clips = TrainingClips(config.videos_root)
    yardstick = pca_psnr(clips.windows(), clips.validation, side, count)
    print(f"to beat: {yardstick:.2f} dB, {count} principal components of each 4x{side}x{side} block", flush=True)
    if any(stage.part for stage in stages):
        training.fit_components(clips, side, count)
    keep_rows(log_file, sum(row["step"] <= training.trainer.step for row in read_log(log_file)))
    with BetweenSteps() as interrupts:
        train(training, stages, clips, state_file, log_file, interrupts)
    training.write(Path(config.output), clips, yardstick)
    state_file.unlink(missing_ok=True)
    return 0


def _files(config: TinyConfig) -> tuple[Path, Path]:
    """The files of the state and of the log, next to the output.

    Raises:
        UserError: the output does not end in .safetensors, a file cannot be written, or two of them are the same.
    """
    output = Path(config.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output is {output}; expected a name that ends in .safetensors")
    state_file, log_file = output.with_suffix(".resume.safetensors"), output.with_suffix(".jsonl")
    for path in (state_file, log_file):
        check_target("next to --output,", path)
    written = {"--output": output, "the saved state": state_file, "the log": log_file}
    check_apart(written, [Path(config.start_from)] if config.start_from else [])
    return state_file, log_file


def _check_stages(stages: list[Stage], model: str) -> None:
    side = MODELS[model][0]
    parts = ("skeleton",) if side == 8 else PARTS
    for stage in stages:
        if stage.side % side:
            raise UserError(f"--stages: a side of {stage.side}; expected multiples of {side} for this model")
        if stage.part and stage.part not in parts:
            raise UserError(f"--stages: a part {stage.part!r}; this model has {', '.join(parts)}")


def train(
    training: TinyTraining,
    stages: list[Stage],
    clips: TrainingClips,
    state_file: Path,
    log_file: Path,
    interrupts: BetweenSteps,
) -> None:
    """Run the steps that are not done yet; log every step, validate and save every hundred.

    Raises:
        KeyboardInterrupt: Ctrl-C came; the state is saved.
    """
    trainer, config, end = training.trainer, training.config, 0
    for stage in stages:
        end += stage.steps
        with skeleton() if stage.part == "skeleton" else nullcontext():
            for _ in tqdm(range(trainer.step, end), desc=f"{stage.side}x{stage.side}", leave=False, disable=None):
                row = training.train_step(clips.crops(stage, training.draws()), stage)
                if trainer.step == trainer.schedule.total_steps:
                    row |= training.validate(clips.validation, stage)
                elif trainer.step % SAVE_STEPS == 0:
                    row |= training.validate(clips.validation[::QUICK_VALIDATION], stage)
                    trainer.save(state_file, config)
                add_to_log(log_file, row)
                if "val_psnr" in row:
                    print(json_text(row), flush=True)
                if interrupts.noted:
                    trainer.save(state_file, config)
                interrupts.check()
