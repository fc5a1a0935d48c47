"""The training of one small VAE: its trainer, and the work of a step and of a validation."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kvae import KVAE
from ...kvae.files import save_weights
from ...kvae.foreign import json_text
from ...kvae.pixels import HUNYUAN_HALF_RANGE, KVAE_HALF_RANGE, to_unit
from ..adapters.muon import Muon
from ..runtime.trainer import Schedule, Trainer
from .components import fit_components, pixel_blocks, repeat_first
from .data import Stage, TrainingClips
from .model import START_LOGVAR, decode, parts_of, posterior_of
from .parts import ENCODES, PARTS, Neighbours

if TYPE_CHECKING:
    from .train import TinyConfig

WARMUP_STEPS = 50
EMA = 0.99
KL_WEIGHT = 1e-2  # per latent value: enough to hold the scale of the latents near 1, too little to blur
PCA_NOISE = 0.03  # added to the principal components that the Hunyuan decoder learns from
PCA_SAMPLE = Stage(steps=1, side=64, batch=400)


@dataclass
class Progress:
    """What the training counts in addition to its steps."""

    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation


class Falls(Schedule):
    """Like `Schedule`, anew for each run of stages that train the same part."""

    def __init__(self, lr: float, stages: list[Stage]):
        super().__init__(lr, sum(stage.steps for stage in stages))
        runs = [[stage.steps for stage in run] for _, run in groupby(stages, key=lambda stage: stage.part)]
        self.schedules = [Schedule(lr, sum(steps), WARMUP_STEPS) for steps in runs]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        for schedule in self.schedules:
            if step < schedule.total_steps:
                return schedule.rate(step)
            step -= schedule.total_steps
        return 0.0


class TinyTraining:
    """The training of one VAE: its trainer, and the work of a step and of a validation."""

    def __init__(self, config: TinyConfig, stages: list[Stage], vae: Any):
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
        optimisers = [Muon(matrices, config.lr), adamw]
        self.trainer = Trainer({"vae": self.vae}, optimisers, Falls(config.lr, stages), EMA, Progress())

    def fit_components(self, clips: TrainingClips, side: int, count: int) -> None:
        """Fit the principal components that skeletons and parts are trained beside."""
        generator = torch.Generator().manual_seed(self.config.seed)
        sample = self.pixels(clips.crops(PCA_SAMPLE, generator))
        if side == 16:
            self.neighbours = Neighbours(parts_of(self.vae), sample.split(16), side, count, generator)
        elif self.config.model == "hunyuan":
            self.components = fit_components(pixel_blocks(sample, side), count)

    def draws(self) -> torch.Generator:
        """Random numbers of the next step: a function of the seed and the step, so a resumed run repeats them."""
        return torch.Generator().manual_seed(1_000_003 * self.config.seed + self.trainer.step)

    def train_step(self, crops: Tensor, stage: Stage) -> dict[str, Any]:
        """Take one step on crops, uint8 [B, 3, T, H, W]; return the row to log."""
        start = time.time()
        x = self.pixels(crops)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            y, mean, latent_loss = self.reconstruct(x, stage)
        mse = (y - repeat_first(x, y.shape[2] - x.shape[2] + 1)).square().flatten(1).mean(1)
        ((mse + 1e-4).log().mean() + latent_loss).backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.trainer.update()
        self.trainer.progress.seconds += time.time() - start
        psnr = (10 * (4 / mse.detach()).log10()).mean().item()
        return {"step": self.trainer.step, "psnr": round(psnr, 2), "std": round(mean.std().item(), 3)}

    def reconstruct(self, x: Tensor, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, 3, T, H, W] → what the stage makes of them, its latents, and their share of the loss."""
        if stage.part == "skeleton" and self.config.model == "hunyuan":
            return self.reconstruct_components(x)
        mean, logvar = self.latents(x, stage.part)
        noise = torch.randn(mean.shape, generator=self.draws()).to(mean)
        y = self.decoded(x, mean + noise * (0.5 * logvar.clamp(-30, 20)).exp(), stage.part)
        latent_loss = KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return y.float(), mean, latent_loss

    def latents(self, x: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of pixels, [B, c, t, h, w] each."""
        if part in ("fine-encoder", "coarse-decoder"):
            mean = self.neighbours.latents.encode(x)
            return mean, torch.full_like(mean, START_LOGVAR)
        if part in PARTS:
            with torch.set_grad_enabled(torch.is_grad_enabled() and part in ENCODES):
                mean, logvar = self.neighbours.encode(x).float().chunk(2, dim=1)
            return mean, logvar
        posterior = posterior_of(self.vae, x)
        return posterior.mean.float(), posterior.logvar.float()

    def decoded(self, x: Tensor, z: Tensor, part: str) -> Tensor:
        """What the part, or all of the VAE, makes of pixels x with latents z."""
        return self.neighbours.decode(part, x, z) if part in PARTS else decode(self.vae, z)

    def reconstruct_components(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `reconstruct`, for the skeleton that learns principal components."""
        posterior = posterior_of(self.vae, x)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        target = self.principal_components(x)
        noise = torch.randn(target.shape, generator=self.draws()).to(target)
        y = decode(self.vae, target + PCA_NOISE * noise)
        return y.float(), mean, (mean - target).square().mean() + 0.1 * (logvar - START_LOGVAR).square().mean()

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
    def validate(self, clips: list[Tensor], stage: Stage) -> dict[str, float]:
        """Mean PSNR over the clips (averaged weights, posterior mean), and the standard deviation of the latents."""
        psnrs, latents = [], []
        with self.trainer.averaged():
            for clip in clips:
                x = self.pixels(clip[None])
                mean, _ = self.latents(x, stage.part)
                y = self.decoded(x, mean, stage.part)[:, :, -x.shape[2] :].clamp(-1, 1)
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
