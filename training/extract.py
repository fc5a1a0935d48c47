"""Latent pairs from videos: each clip through both VAEs, one file a clip.

    python -m training extract --videos-root UCF101 --output-root latents --hunyuan-vae DIR --kvae DIR

Clips are decoded and resized in threads while the VAEs run. What is already there is skipped, so an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..kvae import padded_frames
from .errors import UserError
from .options import option, write_text
from .pairs import SUFFIX, Pair, Source, read_manifest, write_pair
from .vaes import VideoVAE, load_hunyuan_vae, load_kandinsky_vae
from .videos import Clip, cut, find_videos, read_clip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODERS = 4  # threads, and clips read ahead


@dataclass
class ExtractConfig:
    videos_root: str = option(..., "folder of videos; UCF101 or any other")
    output_root: str = option(..., "folder for the pairs; it mirrors the videos' folders")
    hunyuan_vae: str = option("tiny", "HunyuanVideo VAE: folder, .safetensors file, hub id, or tiny")
    kvae: str = option("tiny", "KVAE-3D-1.0: folder, .safetensors file, hub id, or tiny")
    split: str = option("all", "part of UCF101 to take", choices=("all", "train", "test"))
    max_clips: int = option(0, "stop after so many clips; 0 for all")
    clips_per_video: int = option(1, "windows to cut from each video, evenly spaced")
    num_frames: int = option(33, "frames of a clip")
    height: int = option(240, "pixels, a multiple of 8")
    width: int = option(320, "pixels, a multiple of 8")
    sampling: str = option(
        "consecutive",
        "consecutive frames, or uniform: spread over the whole video, as the published adapters were trained",
        choices=("consecutive", "uniform"),
    )
    posterior: str = option("mode", "latent to keep: the posterior's mode, or a sample", choices=("mode", "sample"))
    seed: int = option(0, "for --posterior sample")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "device of both VAEs")
    dtype: str = option("float32", "precision of both VAEs", choices=tuple(DTYPES))


def run(config: ExtractConfig) -> int:
    """Extract; returns 0, or 1 when clips had to be skipped."""
    _check(config)
    root, out = Path(config.videos_root), Path(config.output_root)
    videos = find_videos(root, config.split)
    hunyuan = load_hunyuan_vae(config.hunyuan_vae, config.device, DTYPES[config.dtype])
    kvae = load_kandinsky_vae(config.kvae, config.device, DTYPES[config.dtype])
    manifest = _open_manifest(out, config, hunyuan, kvae)
    made, present = 0, 0
    failed: dict[str, str] = {}
    todo = []
    for path, clip in _targets(videos, root, out, config, failed):
        if path.exists():
            present += 1
        else:
            todo.append((path, clip))
    with tqdm(total=len(todo), desc="extract", unit="clip", disable=None) as bar:
        for path, clip, frames in _read_ahead(todo, config):
            bar.update()
            if isinstance(frames, UserError):
                failed[str(clip.video.relative_to(root))] = str(frames)
                continue
            write_pair(path, _encode(clip, frames, root, hunyuan, kvae, config))
            made += 1
    counts = {"extracted": made, "already_there": present, "skipped": len(failed)}
    write_text(out / "manifest.json", json.dumps(manifest | {"counts": counts, "failed": failed}, indent=2) + "\n")
    for reason in failed.values():
        print(f"skipped: {reason}", file=sys.stderr)
    print(f"{made} pairs extracted, {present} already there, {len(failed)} skipped → {out}")
    if not made and not present:
        raise UserError(f"{root}: none of the {len(videos)} videos gave a pair")
    return 1 if failed else 0


def _check(config: ExtractConfig) -> None:
    for name in ("height", "width"):
        if getattr(config, name) % 8 or getattr(config, name) < 16:
            raise UserError(f"--{name} is {getattr(config, name)}; expected a multiple of 8, at least 16")
    if config.num_frames < 5:
        raise UserError(f"--num-frames is {config.num_frames}; expected at least 5")
    if config.clips_per_video > 1 and config.sampling == "uniform":
        raise UserError("--sampling uniform spreads one clip over the video; --clips-per-video must be 1")


def _open_manifest(out: Path, config: ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE) -> dict:
    """What every pair in the folder shares. A folder keeps to one set of settings."""
    settings = asdict(config)
    for name in ("videos_root", "output_root", "split", "max_clips", "device", "hunyuan_vae", "kvae"):
        del settings[name]
    manifest = {
        "command": "extract",
        "settings": settings,
        "hunyuan_vae": {"space": hunyuan.space.name, "sha256": hunyuan.digest},
        "kvae": {"space": kvae.space.name, "sha256": kvae.digest},
        "config": asdict(config),
    }
    old = read_manifest(out)
    for key in old:
        if old[key] != manifest[key]:
            raise UserError(
                f"{out}: holds pairs made with another {key}: {old[key]}; now {manifest[key]}. "
                "Choose another --output-root"
            )
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def _targets(
    videos: list[Path], root: Path, out: Path, config: ExtractConfig, failed: dict[str, str]
) -> Iterator[tuple[Path, Clip]]:
    """The file and the clip of every pair to be, at most max_clips."""
    count = 0
    for video in videos:
        relative = video.relative_to(root)
        try:
            clips = cut(video, config.num_frames, config.clips_per_video)
        except UserError as error:
            failed[str(relative)] = str(error)
            continue
        for i, clip in enumerate(clips):
            if config.max_clips and count >= config.max_clips:
                return
            count += 1
            stem = relative.stem if config.clips_per_video == 1 else f"{relative.stem}.{i:03d}"
            if config.sampling == "uniform":
                clip = Clip(clip.video, clip.count, None)
            yield out / relative.parent / (stem + SUFFIX), clip


def _read_ahead(
    todo: list[tuple[Path, Clip]], config: ExtractConfig
) -> Iterator[tuple[Path, Clip, Tensor | UserError]]:
    """Decoded clips in order, a few of them always under way."""

    def read(clip: Clip) -> Tensor | UserError:
        try:
            return read_clip(clip, config.height, config.width)
        except UserError as error:
            return error

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: list[tuple[Path, Clip, Future]] = []
        try:
            for path, clip in todo:
                waiting.append((path, clip, pool.submit(read, clip)))
                if len(waiting) > DECODERS:
                    path, clip, future = waiting.pop(0)
                    yield path, clip, future.result()
            for path, clip, future in waiting:
                yield path, clip, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _encode(clip: Clip, frames: Tensor, root: Path, hunyuan: VideoVAE, kvae: VideoVAE, config: ExtractConfig) -> Pair:
    generator = None
    if config.posterior == "sample":
        seed = zlib.crc32(f"{config.seed} {clip.video.relative_to(root).as_posix()} {clip.first}".encode())
        generator = torch.Generator(config.device).manual_seed(seed)
    count = frames.shape[1]
    source = Source(
        video=clip.video.relative_to(root).as_posix(),
        first=clip.first,
        frames=count,
        padded=padded_frames(count) - count,
        height=config.height,
        width=config.width,
    )
    z_h, z_k = (vae.encode(frames[None], generator)[0] for vae in (hunyuan, kvae))
    return Pair(z_h, z_k, source)
