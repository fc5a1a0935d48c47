"""Train one of the embedded small VAEs, for the demo, the tests and the benchmarks.

    python -m training tiny --model kvae --videos-root UCF101 --output tiny_kvae.safetensors --seed 1
    python -m training tiny --model hunyuan --videos-root UCF101 --output tiny_hunyuan.safetensors --seed 2

Both have the true architectures and learn apart, from different random starts, so that their latent spaces really
differ. UCF101's groups g01 to g07 are for validation. What makes CPU hours go far:
- first the skeleton alone (shortcuts and resamplers, every residual branch left out), a near-linear codec; the Hunyuan
  one learns principal components of 4x8x8 blocks there, the KVAE finds its own latents; the branches join from zero;
- wide random biases ahead of the last norms, so that a clip's brightness and contrast survive GroupNorm from the start;
- the loss is the mean of log(MSE) over clips, which is PSNR, so that easy clips count as much as hard ones;
- Muon for the convolutions; small crops first, larger ones last.
Ctrl-C or a crash costs at most the steps since the last save: the same command goes on from there.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from torch import Tensor, nn
from tqdm import tqdm

from ..kvae import KVAE, KVAEConfig, foreign, load_kvae
from ..kvae.files import Weights, save_weights
from ..kvae.layers import ResnetBlock
from ..kvae.pixels import HUNYUAN_HALF_RANGE, KVAE_HALF_RANGE, to_unit
from ..serving.fit import resize
from .adapters.muon import Muon
from .data.videos import Clip, find_videos, read_clip
from .errors import UserError
from .options import DEVICE, MOST_SEED, option
from .runtime.checkpoint import open_state, optimiser_tensors, restore_optimiser
from .runtime.interrupts import BetweenSteps
from .runtime.log import add_to_log, keep_rows, read_log
from .runtime.places import check_apart, check_target
from .vaes import load_hunyuan_vae

FRAMES = 17
SIDE = 128  # of the validation clips, and of the small copies of the training clips
TRAIN_FRAMES = 96  # of each training video, kept in memory
SAVE_STEPS = 100
QUICK_VALIDATION = 6  # one clip in so many, along the way; all of them at the end
WARMUP_STEPS = 50
EMA = 0.99
KL_WEIGHT = 1e-2  # per latent value: enough to hold the scale of the latents near 1, too little to blur
START_LOGVAR = -9.0
MOST_BATCH_BYTES = 2**30  # of a step's crops as float32; activations take some thirty times as much
PCA_NOISE = 0.03  # on the principal components that the Hunyuan decoder learns from


@dataclass
class TinyConfig:
    videos_root: str = option(..., "UCF101, or part of it")
    output: str = option(..., "file to write, NAME.safetensors", writes="file")
    model: str = option("kvae", "which of the pair", choices=("kvae", "hunyuan"))
    start_from: str = option("", "an earlier output, to train on")
    stages: str = option(
        "1600x32x4s,600x32x4,950x64x2,100x128x1",
        "STEPSxSIDExBATCH of each stage, crops of 17xSIDExSIDE; an s at the end: skeleton only",
    )
    lr: float = option(1.5e-3, "peak learning rate; falls linearly to zero over all stages", above=0)
    seed: int = option(0, "of the weights and the crops", least=0, most=MOST_SEED)
    threads: int = option(0, "CPU threads; 0 for PyTorch's choice", least=0, most=1024)
    device: str = option(DEVICE, "device to train on")


@dataclass(frozen=True)
class Stage:
    """So many steps on batches of so many crops, 17 frames of side x side pixels."""

    steps: int
    side: int
    batch: int
    skeleton: bool


@dataclass(frozen=True)
class Progress:
    """Where a saved run was."""

    step: int
    seconds: float
    metrics: dict[str, float]


PCA_SAMPLE = Stage(steps=1, side=64, batch=400, skeleton=False)


def run(config: TinyConfig) -> int:
    """Train, or go on training; returns 0."""
    if config.threads:
        torch.set_num_threads(config.threads)
    stages = parse_stages(config.stages)
    state_file, log_file = _files(config)
    torch.manual_seed(config.seed)
    vae = build(config)
    _check_sides(stages, vae)
    trainer = Trainer(config, sum(stage.steps for stage in stages), vae)
    trainer.resume(state_file)
    data = Data(config)
    yardstick = pca_psnr(data.windows(), data.validation)
    print(f"to beat: {yardstick:.2f} dB, 16 principal components of each 4x8x8 block")
    trainer.find_components(data)
    keep_rows(log_file, sum(row["step"] <= trainer.step for row in read_log(log_file)))
    with BetweenSteps() as interrupts:
        train(trainer, stages, data, (state_file, log_file), interrupts)
    trainer.write(Path(config.output), data, yardstick)
    state_file.unlink(missing_ok=True)
    return 0


def _files(config: TinyConfig) -> tuple[Path, Path]:
    """Where the state and the log go, beside the output.

    Raises:
        UserError: the output is no name for weights, or one of the three cannot be written, or is another file too.
    """
    output = Path(config.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output is {output}; expected a name that ends in .safetensors")
    state_file, log_file = output.with_suffix(".resume.safetensors"), output.with_suffix(".jsonl")
    for path in (state_file, log_file):
        check_target("beside --output,", path)
    written = {"--output": output, "the saved state": state_file, "the log": log_file}
    check_apart(written, [Path(config.start_from)] if config.start_from else [])
    return state_file, log_file


def train(
    trainer: Trainer, stages: list[Stage], data: Data, files: tuple[Path, Path], interrupts: BetweenSteps
) -> None:
    """The stages that are not behind us; logs every step, validates and saves every hundred.

    Args:
        files: of the state and of the log.
    """
    state_file, log_file = files
    end = 0
    for stage in stages:
        end += stage.steps
        name = f"{stage.side}x{stage.side}"
        with skeleton() if stage.skeleton else nullcontext():
            for _ in tqdm(range(trainer.step, end), desc=name, leave=False, disable=None):
                row = trainer.train_step(data.crops(stage, trainer.draws()), stage)
                if trainer.step == trainer.total_steps:
                    row |= trainer.validate(data.validation)
                elif trainer.step % SAVE_STEPS == 0:
                    row |= trainer.validate(data.validation[::QUICK_VALIDATION])
                    trainer.save(state_file)
                add_to_log(log_file, row)
                if "val_psnr" in row:
                    print(foreign.json_text(row), flush=True)
                if interrupts.noted:
                    trainer.save(state_file)
                interrupts.check()


def parse_stages(text: str) -> list[Stage]:
    """The stages of `--stages`.

    Raises:
        UserError: they do not read as stages.
    """
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,2})x([1-9][0-9]{0,8})(s?)", part.strip())
        if not match or int(match[2]) % 8 or int(match[2]) > SIDE:
            raise UserError(f"--stages: {part!r}; expected STEPSxSIDExBATCH, a side of 8n up to {SIDE}, like 600x64x2")
        stages.append(Stage(int(match[1]), int(match[2]), int(match[3]), bool(match[4])))
        size = stages[-1].batch * 3 * FRAMES * stages[-1].side ** 2 * 4
        if size > MOST_BATCH_BYTES:
            raise UserError(
                f"--stages: {part!r}; a batch would be {size / 1e9:,.1f} GB as float32, expected at most "
                f"{MOST_BATCH_BYTES / 1e9:.1f}"
            )
    return stages


def _check_sides(stages: list[Stage], vae: Any) -> None:
    multiple = vae.config.spatial_factor if isinstance(vae, KVAE) else 8
    for stage in stages:
        if stage.side % multiple:
            raise UserError(f"--stages: a side of {stage.side}; expected multiples of {multiple} for this model")


class Data:
    """Training clips in two sizes, as uint8 in memory, and the validation clips."""

    def __init__(self, config: TinyConfig):
        self.small: list[Tensor] = []
        self.full: list[Tensor] = []
        for video in tqdm(find_videos(config.videos_root, "train"), desc="reading", leave=False, disable=None):
            frames = _long_enough(video, read_clip(Clip(video, TRAIN_FRAMES, 0), 240, 320))
            self.full.append(frames)
            self.small.append(torch.stack([resize(frame, SIDE, SIDE) for frame in frames.unbind(1)], 1))
        videos = find_videos(config.videos_root, "test")
        self.validation = [_long_enough(video, read_clip(Clip(video, FRAMES, 0), SIDE, SIDE)) for video in videos]

    def windows(self) -> list[Tensor]:
        """The first two windows of 17 frames of every training clip, small."""
        return [clip[:, t : t + FRAMES] for clip in self.small for t in (0, FRAMES) if t + FRAMES <= clip.shape[1]]

    def crops(self, stage: Stage, generator: torch.Generator) -> Tensor:
        """uint8 [B, 3, 17, side, side]: 9 of 10 from the small copies, mirrored and reversed at random."""
        return torch.stack([self._crop(stage.side, generator) for _ in range(stage.batch)])

    def _crop(self, side: int, generator: torch.Generator) -> Tensor:
        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        pool = self.small if side == SIDE or draw(10) < 9 else self.full
        video = pool[draw(len(pool))]
        t, y, x = (draw(size - part + 1) for size, part in zip(video.shape[1:], (FRAMES, side, side), strict=True))
        crop = video[:, t : t + FRAMES, y : y + side, x : x + side]
        crop = crop.flip(3) if draw(2) else crop
        return crop.flip(1) if draw(2) else crop


def _long_enough(video: Path, frames: Tensor) -> Tensor:
    if frames.shape[1] < FRAMES:
        raise UserError(f"{video}: {frames.shape[1]} frames; expected at least {FRAMES}: take it out of --videos-root")
    return frames


class Trainer:
    """The VAE, its moving average, two optimisers, and the step they are at."""

    def __init__(self, config: TinyConfig, total_steps: int, vae: Any):
        self.config, self.total_steps = config, total_steps
        self.half_range = KVAE_HALF_RANGE if config.model == "kvae" else HUNYUAN_HALF_RANGE
        self.vae = vae.to(config.device, memory_format=torch.channels_last_3d)
        self.average = {key: tensor.clone() for key, tensor in self.vae.state_dict().items()}
        named = list(self.vae.named_parameters())
        matrices = [p for _, p in named if p.ndim >= 4 and min(p.shape[0], p[0].numel()) > 3]
        self.rest = [p for _, p in named if not any(p is m for m in matrices)]
        adam = torch.optim.AdamW(self.rest, config.lr, betas=(0.9, 0.99), weight_decay=0)
        self.optimisers = [Muon(matrices, config.lr), adam]
        self.step, self.seconds, self.metrics = 0, 0.0, dict[str, float]()

    def find_components(self, data: Data) -> None:
        """Those that the Hunyuan skeleton learns from."""
        sample = data.crops(PCA_SAMPLE, torch.Generator().manual_seed(self.config.seed))
        self.components = fit_components(blocks(self.pixels(sample)))

    def train_step(self, crops: Tensor, stage: Stage) -> dict[str, Any]:
        """One step on uint8 [B, 3, T, H, W]; returns what to log."""
        start = time.time()
        lr = self.config.lr * min(1, (self.step + 1) / WARMUP_STEPS) * (1 - self.step / self.total_steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
        x = self.pixels(crops)
        posterior = posterior_of(self.vae, x)
        mean, logvar = posterior.mean, posterior.logvar
        if stage.skeleton and self.config.model == "hunyuan":
            target = self.principal_components(x)
            noise = torch.randn(target.shape, generator=self.draws()).to(target)
            y = decode(self.vae, target + PCA_NOISE * noise)
            latent_loss = (mean - target).square().mean() + 0.1 * (logvar - START_LOGVAR).square().mean()
        else:
            noise = torch.randn(mean.shape, generator=self.draws()).to(mean)
            y = decode(self.vae, mean + noise * (0.5 * logvar.clamp(-30, 20)).exp())
            latent_loss = KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = (y - x).square().flatten(1).mean(1)
        ((mse + 1e-4).log().mean() + latent_loss).backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA, self.step / (self.step + 10))
        for key, tensor in self.vae.state_dict().items():
            self.average[key].lerp_(tensor, 1 - decay)
        self.seconds += time.time() - start
        psnr = (10 * (4 / mse.detach()).log10()).mean().item()
        return {"step": self.step, "psnr": round(psnr, 2), "std": round(mean.std().item(), 3)}

    def draws(self) -> torch.Generator:
        """Random numbers of this step: a function of the seed and the step, so that a resumed run repeats them."""
        return torch.Generator().manual_seed(1_000_003 * self.config.seed + self.step)

    def pixels(self, crops: Tensor) -> Tensor:
        """uint8 → this VAE's −1..1, channels last."""
        x = to_unit(crops.to(self.config.device), self.half_range)
        return x.contiguous(memory_format=torch.channels_last_3d)

    def principal_components(self, x: Tensor) -> Tensor:
        """Whitened principal components of the blocks of x, [B, 16, t, h, w]."""
        mean, projection = self.components
        return ((blocks(x) - mean) @ projection).permute(0, 4, 1, 2, 3)

    @torch.inference_mode()
    def validate(self, clips: list[Tensor]) -> dict[str, float]:
        """Mean PSNR over the clips of the averaged weights, posterior mean, and the deviation of the latents."""
        live = {key: tensor.clone() for key, tensor in self.vae.state_dict().items()}
        self.vae.load_state_dict(self.average)
        psnrs, latents = [], []
        for clip in clips:
            x = self.pixels(clip[None])
            mean = posterior_of(self.vae, x).mean
            y = decode(self.vae, mean).clamp(-1, 1)
            psnrs.append(10 * math.log10(4 / (y - x).square().mean().item()))
            latents.append(mean)
        self.vae.load_state_dict(live)
        self.metrics = {"val_psnr": sum(psnrs) / len(psnrs), "val_std": torch.cat(latents).std().item()}
        return self.metrics

    def save(self, path: Path) -> None:
        """All that going on needs."""
        tensors = {f"live.{key}": tensor.clone() for key, tensor in self.vae.state_dict().items()}
        tensors |= {f"average.{key}": tensor for key, tensor in self.average.items()}
        for i, optimiser in enumerate(self.optimisers):
            tensors |= optimiser_tensors(f"optimiser{i}", optimiser)
        progress = {"step": self.step, "seconds": self.seconds, "metrics": self.metrics}
        metadata = {"config": json.dumps(asdict(self.config)), "progress": json.dumps(progress)}
        save_weights(path, tensors, metadata)

    def resume(self, path: Path) -> None:
        """Go on from a saved state, where there is one."""
        saved = open_state(path, self.config)
        if saved is None:
            return
        try:
            self._restore(saved)
        except Exception as error:  # a state that somebody else has written can fail anywhere
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path}: not the state of a training run ({what}); delete it to start anew") from None

    def _restore(self, saved: Weights) -> None:
        for key, tensor in self.average.items():
            if saved.shapes[f"average.{key}"] != tuple(tensor.shape):
                raise ValueError(f"average.{key} is {saved.shapes[f'average.{key}']}")
        self.vae.load_state_dict({key: saved[f"live.{key}"] for key in self.average})
        self.average = {key: saved[f"average.{key}"].to(self.config.device) for key in self.average}
        for i, optimiser in enumerate(self.optimisers):
            restore_optimiser(f"optimiser{i}", optimiser, saved)
        progress = foreign.build(Progress, foreign.parse_object(saved.metadata["progress"]))
        if not 0 <= progress.step <= self.total_steps:
            raise ValueError(f"step {progress.step} of {self.total_steps}")
        self.step, self.seconds, self.metrics = progress.step, progress.seconds, progress.metrics

    def write(self, path: Path, data: Data, yardstick: float) -> None:
        """The averaged weights as fp16, with config and recipe in the metadata."""
        vae_config = self.vae.config.to_dict() if isinstance(self.vae, KVAE) else dict(self.vae.config)
        config = {key: value for key, value in vae_config.items() if not key.startswith("_")}
        recipe = asdict(self.config)
        for key in ("videos_root", "output", "device", "threads"):
            del recipe[key]
        recipe |= {"videos": f"UCF101, {len(data.full)} clips of groups g08 and up", "seconds": round(self.seconds)}
        metadata = {
            "config": json.dumps(config),
            "recipe": json.dumps(recipe),
            "metrics": foreign.json_text(self.metrics | {"val_clips": len(data.validation), "pca_psnr": yardstick}),
        }
        tensors = {key: tensor.half().contiguous() for key, tensor in self.average.items()}
        save_weights(path, tensors, metadata)
        print(f"{path}: {self.metrics['val_psnr']:.2f} dB on {len(data.validation)} clips")


def build(config: TinyConfig) -> Any:
    """An untrained member of the pair, or the one to start from."""
    if config.start_from:
        load = load_kvae if config.model == "kvae" else lambda path: load_hunyuan_vae(path, "cpu").vae
        return load(config.start_from).train().requires_grad_(True)
    widths = (16, 32, 64, 80)
    if config.model == "kvae":
        vae: Any = KVAE(KVAEConfig(widths, widths, num_res_blocks=1, norm_groups=8))
    else:
        vae = AutoencoderKLHunyuanVideo(block_out_channels=widths, layers_per_block=1, norm_num_groups=4)
    initialise(vae)
    return vae


@torch.no_grad()
def initialise(vae: Any) -> None:
    """Residual branches at zero, 1x1x1 convolutions orthogonal, wide biases ahead of the last norms."""
    kvae = isinstance(vae, KVAE)
    for name, module in vae.named_modules():
        if name.endswith((".conv2.conv", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith((".conv_y", ".conv_b")):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.constant_(module.bias, float(name.endswith("y")))
        elif isinstance(module, nn.Conv3d) and module.kernel_size == (1, 1, 1):
            module.weight.copy_(nn.init.orthogonal_(torch.empty(module.weight.shape[:2]))[..., None, None, None])
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv3d) and not kvae and ("samplers" in name or "conv_in" in name):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if kvae:
        last_shortcuts = vae.encoder.down[-1].block[0].nin_shortcut, vae.decoder.up[0].block[0].nin_shortcut
        encoder_bias = vae.encoder.conv_out.conv.bias
    else:
        blocks_ = vae.encoder.down_blocks[-1], vae.decoder.up_blocks[-1]
        last_shortcuts = tuple(block.resnets[0].conv_shortcut.conv for block in blocks_)
        encoder_bias = vae.quant_conv.bias
    for conv in last_shortcuts:
        # the Hunyuan decoder has no other way around its last GroupNorm; KVAE's norms see the latent itself
        nn.init.normal_(conv.bias, std=1.0 if kvae else 3.0)
    encoder_bias[len(encoder_bias) // 2 :] = START_LOGVAR


@contextmanager
def skeleton() -> Iterator[None]:
    """While this lasts, every residual block is its shortcut."""
    ours: Any = ResnetBlock
    theirs: Any = HunyuanVideoResnetBlockCausal3D
    forwards = ours.forward, theirs.forward
    ours.forward = lambda block, x, cache, z=None: block.shortcut(x)
    theirs.forward = lambda block, x: x if block.conv_shortcut is None else block.conv_shortcut(x)
    try:
        yield
    finally:
        ours.forward, theirs.forward = forwards


def posterior_of(vae: Any, x: Tensor) -> Any:
    """Mean and log-variance, of either VAE."""
    return vae.posterior(x) if isinstance(vae, KVAE) else vae.encode(x).latent_dist


def decode(vae: Any, z: Tensor) -> Tensor:
    """Latents → pixels, of either VAE."""
    return vae.decode(z) if isinstance(vae, KVAE) else vae.decode(z).sample


def blocks(x_B3THW: Tensor) -> Tensor:
    """[B, 3, 4n + 1, H, W] → [B, n + 1, H/8, W/8, 768]: the 4x8x8 block of each latent, frame 0 four times over."""
    x = torch.cat([x_B3THW[:, :, :1].expand(-1, -1, 3, -1, -1), x_B3THW], dim=2)
    B, C, T, H, W = x.shape
    x = x.reshape(B, C, T // 4, 4, H // 8, 8, W // 8, 8)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def fit_components(blocks_Bthwf: Tensor, count: int = 16) -> tuple[Tensor, Tensor]:
    """Mean [f] and whitening projection [f, count] of blocks."""
    x = blocks_Bthwf.flatten(0, 3)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())
    return mean, (vectors[:, -count:] / values[-count:].sqrt()).float()


def pca_psnr(train: list[Tensor], validation: list[Tensor], count: int = 16) -> float:
    """The yardstick: mean PSNR of clips, uint8 [3, T, H, W], each 4x8x8 block coded by its first components."""
    x = torch.cat([blocks(to_unit(clip[None], HUNYUAN_HALF_RANGE)).flatten(0, 3) for clip in train])
    mean, projection = fit_components(x[None, None, None], count)
    basis = F.normalize(projection, dim=0)
    psnrs = []
    for clip in validation:
        y = blocks(to_unit(clip[None], HUNYUAN_HALF_RANGE))
        error = (((y - mean) @ basis @ basis.T + mean).clamp(-1, 1) - y).square().mean((0, 2, 3, 4))
        # the first block holds one frame four times, the others four
        mse = (error[0] + 4 * error[1:].sum()) / (4 * len(error) - 3)
        psnrs.append(10 * math.log10(4 / mse.item()))
    return sum(psnrs) / len(psnrs)
