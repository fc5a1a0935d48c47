"""Train one of the embedded small VAEs, for the demo, the tests and the benchmarks.

    python -m training tiny --model kvae --videos-root UCF101 --output tiny_kvae.safetensors --seed 1
    python -m training tiny --model hunyuan --videos-root UCF101 --output tiny_hunyuan.safetensors --seed 2

All have the true architectures. They are trained separately, from different random starts, so that the latent spaces of
a pair (kvae and hunyuan, kvae-t4s16 and hunyuan-1.5) really differ. UCF101's groups g01 to g07 are for validation. What
makes CPU hours go far:
- First only the skeleton is trained (shortcuts and resamplers, no residual branches), a near-linear codec. Hunyuan's
  learns principal components of 4x8x8 blocks; KVAEs find their own latents. The branches join later, from zero.
  HunyuanVideo 1.5's needs no such stage: `linear_start` computes a codec for it.
- Biases before the last norms start wide and random, so that a clip's brightness and contrast survive the norms.
- The loss is the mean of log(MSE) over clips, which is PSNR, so easy clips count as much as hard ones.
- Muon trains the convolutions. Small crops come first, larger ones last.
Ctrl-C saves the state, as every hundredth step does. A crash loses the steps since. The same command then continues.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...kvae import KVAE
from ...kvae.files import save_weights
from ...kvae.foreign import json_text
from ...kvae.pixels import HUNYUAN_HALF_RANGE, KVAE_HALF_RANGE, to_unit
from ..adapters.muon import Muon
from ..errors import UserError
from ..options import DEVICE, MOST_SEED, option
from ..runtime.interrupts import BetweenSteps
from ..runtime.log import add_to_log, keep_rows, read_log
from ..runtime.places import check_apart, check_target
from ..runtime.trainer import Schedule, Trainer
from .components import fit_components, pca_psnr, pixel_blocks
from .data import Stage, TrainingClips, parse_stages
from .linear_start import start_linear
from .model import MODELS, START_LOGVAR, build, decode, posterior_of, skeleton

SAVE_STEPS = 100
QUICK_VALIDATION = 6  # every 6th validation clip during the training; all of them at the end
WARMUP_STEPS = 50
EMA = 0.99
KL_WEIGHT = 1e-2  # per latent value: enough to hold the scale of the latents near 1, too little to blur
PCA_NOISE = 0.03  # added to the principal components that the Hunyuan decoder learns from
PCA_SAMPLE = Stage(steps=1, side=64, batch=400, skeleton=False)


@dataclass
class TinyConfig:
    videos_root: str = option(..., "folder of videos: UCF101, or part of it")
    output: str = option(..., "file to write, NAME.safetensors", writes="file")
    model: str = option("kvae", "VAE to train", choices=tuple(MODELS))
    start_from: str = option("", "file to start from, an earlier --output; without it, random weights")
    stages: str = option(
        "1600x32x4s,600x32x4,950x64x2,100x128x1",
        "STEPSxSIDExBATCH of each stage: crops of 17xSIDExSIDE; with an s at the end, the skeleton only",
        metavar="STAGES",
    )
    lr: float = option(1.5e-3, "peak learning rate; falls linearly to zero over all stages", above=0)
    seed: int = option(0, "seed of the weights and the crops", least=0, most=MOST_SEED)
    bfloat16: bool = option(False, "compute convolutions in bfloat16, which some processors do twice as fast")
    threads: int = option(0, "CPU threads; 0 for PyTorch's choice", least=0, most=1024)
    device: str = option(DEVICE, "device to train on", metavar="DEVICE")


@dataclass
class Progress:
    """What the training counts in addition to its steps."""

    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation


def run(config: TinyConfig) -> int:
    """Train, or resume an unfinished training; returns 0."""
    if config.threads:
        torch.set_num_threads(config.threads)
    stages = parse_stages(config.stages)
    state_file, log_file = _files(config)
    torch.manual_seed(config.seed)
    _check_stages(stages, config.model)
    vae = build(config.model, config.start_from)
    training = TinyTraining(config, sum(stage.steps for stage in stages), vae)
    training.trainer.resume(state_file, config)
    clips = TrainingClips(config.videos_root)
    side, count = MODELS[config.model]
    yardstick = pca_psnr(clips.windows(), clips.validation, side, count)
    print(f"to beat: {yardstick:.2f} dB, {count} principal components of each 4x{side}x{side} block", flush=True)
    if config.model == "hunyuan":
        training.find_components(clips)
    if config.model == "hunyuan-1.5" and not config.start_from and training.trainer.step == 0:
        # the first step replaces most of the averages, so they need no update
        start_linear(vae, training.pixels(clips.crops(PCA_SAMPLE, training.draws())), START_LOGVAR)
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
    multiple = MODELS[model][0]
    for stage in stages:
        if stage.side % multiple:
            raise UserError(f"--stages: a side of {stage.side}; expected multiples of {multiple} for this model")
        if stage.skeleton and model == "hunyuan-1.5":
            raise UserError("--stages: a stage of the skeleton; this model starts as a codec, so leave the s out")


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
        with skeleton() if stage.skeleton else nullcontext():
            for _ in tqdm(range(trainer.step, end), desc=f"{stage.side}x{stage.side}", leave=False, disable=None):
                row = training.train_step(clips.crops(stage, training.draws()), stage)
                if trainer.step == trainer.schedule.total_steps:
                    row |= training.validate(clips.validation)
                elif trainer.step % SAVE_STEPS == 0:
                    row |= training.validate(clips.validation[::QUICK_VALIDATION])
                    trainer.save(state_file, config)
                add_to_log(log_file, row)
                if "val_psnr" in row:
                    print(json_text(row), flush=True)
                if interrupts.noted:
                    trainer.save(state_file, config)
                interrupts.check()


class TinyTraining:
    """The training of one VAE: its trainer, and the work of a step and of a validation."""

    def __init__(self, config: TinyConfig, total_steps: int, vae: Any):
        self.config = config
        self.half_range = KVAE_HALF_RANGE if isinstance(vae, KVAE) else HUNYUAN_HALF_RANGE
        # Apple's GPU has no channels-last convolutions over three axes
        apple = torch.device(config.device).type == "mps"
        self.memory_format = torch.contiguous_format if apple else torch.channels_last_3d
        self.vae = vae.to(config.device)
        for weight in self.vae.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=self.memory_format)
        parameters = list(self.vae.parameters())
        matrices = [p for p in parameters if p.ndim >= 4 and min(p.shape[0], p[0].numel()) > 3]
        self.rest = [p for p in parameters if not any(p is m for m in matrices)]
        adamw = torch.optim.AdamW(self.rest, config.lr, betas=(0.9, 0.99), weight_decay=0)
        schedule = Schedule(config.lr, total_steps, WARMUP_STEPS)
        self.trainer = Trainer({"vae": self.vae}, [Muon(matrices, config.lr), adamw], schedule, EMA, Progress())

    def find_components(self, clips: TrainingClips) -> None:
        """Fit the principal components that the Hunyuan skeleton learns from."""
        sample = clips.crops(PCA_SAMPLE, torch.Generator().manual_seed(self.config.seed))
        self.components = fit_components(pixel_blocks(self.pixels(sample), 8), 16)

    def draws(self) -> torch.Generator:
        """Random numbers of the next step: a function of the seed and the step, so a resumed run repeats them."""
        return torch.Generator().manual_seed(1_000_003 * self.config.seed + self.trainer.step)

    def train_step(self, crops: Tensor, stage: Stage) -> dict[str, Any]:
        """Take one step on crops, uint8 [B, 3, T, H, W]; return the row to log."""
        start = time.time()
        x = self.pixels(crops)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            y, mean, latent_loss = self.reconstruct(x, stage)
        mse = (y - x).square().flatten(1).mean(1)
        ((mse + 1e-4).log().mean() + latent_loss).backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.trainer.update()
        self.trainer.progress.seconds += time.time() - start
        psnr = (10 * (4 / mse.detach()).log10()).mean().item()
        return {"step": self.trainer.step, "psnr": round(psnr, 2), "std": round(mean.std().item(), 3)}

    def reconstruct(self, x: Tensor, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, 3, T, H, W] → the VAE's reconstruction, its latents, and the part of the loss that is theirs."""
        posterior = posterior_of(self.vae, x)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        if stage.skeleton and self.config.model == "hunyuan":
            target = self.principal_components(x)
            noise = torch.randn(target.shape, generator=self.draws()).to(target)
            y = decode(self.vae, target + PCA_NOISE * noise)
            latent_loss = (mean - target).square().mean() + 0.1 * (logvar - START_LOGVAR).square().mean()
        else:
            noise = torch.randn(mean.shape, generator=self.draws()).to(mean)
            y = decode(self.vae, mean + noise * (0.5 * logvar.clamp(-30, 20)).exp())
            latent_loss = KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return y.float(), mean, latent_loss

    def pixels(self, crops: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] → floats in −1..1 as this VAE scales them, in the memory format of its weights."""
        x = to_unit(crops.to(self.config.device), self.half_range)
        return x.contiguous(memory_format=self.memory_format)

    def principal_components(self, x: Tensor) -> Tensor:
        """Whitened principal components of the blocks of x, [B, 16, t, h, w]."""
        mean, projection = self.components
        z = ((pixel_blocks(x, 8) - mean) @ projection).movedim(-1, 1)
        return z.contiguous(memory_format=self.memory_format)

    @torch.inference_mode()
    def validate(self, clips: list[Tensor]) -> dict[str, float]:
        """Mean PSNR over the clips (averaged weights, posterior mean), and the standard deviation of the latents."""
        psnrs, latents = [], []
        with self.trainer.averaged():
            for clip in clips:
                x = self.pixels(clip[None])
                mean = posterior_of(self.vae, x).mean
                y = decode(self.vae, mean).clamp(-1, 1)
                psnrs.append(10 * math.log10(4 / (y - x).square().mean().item()))
                latents.append(mean)
        metrics = {"val_psnr": sum(psnrs) / len(psnrs), "val_std": torch.cat(latents).std().item()}
        self.trainer.progress.metrics = metrics
        return metrics

    def write(self, path: Path, clips: TrainingClips, yardstick: float) -> None:
        """Write the averaged weights as float16, with the VAE's config, the recipe and the metrics as metadata."""
        vae_config = self.vae.config.to_dict() if isinstance(self.vae, KVAE) else dict(self.vae.config)
        config = {key: value for key, value in vae_config.items() if not key.startswith("_")}
        progress = self.trainer.progress
        recipe = asdict(self.config)
        for key in ("videos_root", "output", "device", "threads"):
            del recipe[key]
        recipe |= {
            "videos": f"UCF101, {len(clips.full)} clips of groups g08 and up",
            "seconds": round(progress.seconds),
        }
        metadata = {
            "config": json.dumps(config),
            "recipe": json.dumps(recipe),
            "metrics": json_text(progress.metrics | {"val_clips": len(clips.validation), "pca_psnr": yardstick}),
        }
        tensors = {key: tensor.half().contiguous() for key, tensor in self.trainer.averages["vae"].items()}
        save_weights(path, tensors, metadata)
        print(f"{path}: {progress.metrics['val_psnr']:.2f} dB on {len(clips.validation)} clips")
