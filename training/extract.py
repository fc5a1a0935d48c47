"""Latent pairs from videos: each clip through both VAEs, one file a clip.

    python -m training extract --videos-root UCF101 --output-root latents --hunyuan-vae DIR --kvae DIR
    accelerate launch --num_processes 8 -m training extract …

Videos are decoded and resized in threads while the VAEs run, and pairs are written while they run on. Several
processes share the videos. What is already there is skipped, so an interrupted run goes on where it stopped, with any
number of processes.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..kvae import padded_frames
from ..kvae.paths import write_text
from .ahead import ahead
from .errors import UserError
from .options import DEVICE, HUNYUAN_HELP, KVAE_HELP, option
from .pairs import MANIFEST, SUFFIX, VAES, Pair, Source, own_manifest, same_vae, without_signature, write_pair
from .processes import Processes
from .vaes import VideoVAE, check_grids, load_hunyuan_vae, load_kandinsky_vae, made_with
from .videos import Clip, cut, find_videos, read_clips

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODERS = 4  # threads, one video each
BATCH_SIZE = 4 if DEVICE == "cuda" else 1  # of several clips, a CPU's caches hold less


@dataclass
class ExtractConfig:
    videos_root: str = option(..., "folder of videos; UCF101 or any other")
    output_root: str = option(..., "folder for the pairs; it mirrors the videos' folders")
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP)
    kvae: str = option("tiny", KVAE_HELP)
    split: str = option("all", "part of UCF101 to take", choices=("all", "train", "test"))
    max_clips: int = option(0, "stop after so many clips; 0 for all")
    clips_per_video: int = option(1, "windows to cut from each video, evenly spaced")
    mirror: str = option("no", "every window mirrored as well, left to right: twice the pairs", choices=("no", "yes"))
    num_frames: int = option(33, "frames of a clip")
    height: int = option(240, "pixels, a multiple of 8 or 16, as the VAEs need")
    width: int = option(320, "pixels, a multiple of 8 or 16, as the VAEs need")
    sampling: str = option(
        "consecutive",
        "consecutive frames, or uniform: spread over the whole video, as the published adapters were trained",
        choices=("consecutive", "uniform"),
    )
    posterior: str = option("mode", "latent to keep: the posterior's mode, or a sample", choices=("mode", "sample"))
    seed: int = option(0, "for --posterior sample")
    batch_size: int = option(BATCH_SIZE, "clips that go through a VAE at once")
    device: str = option(DEVICE, "device of both VAEs")
    dtype: str = option("float32", "precision of both VAEs", choices=tuple(DTYPES))


@dataclass(frozen=True)
class Job:
    """A clip on its way into a pair file: its frames once they are read, or why there are none."""

    path: Path
    clip: Clip
    mirrored: bool = False
    frames: Tensor | None = None  # uint8 [3, T, H, W]
    failure: str = ""


def run(config: ExtractConfig) -> int:
    """Extract; returns 0, or 1 when clips had to be skipped."""
    processes = Processes(config.device)
    root, out = Path(config.videos_root), Path(config.output_root)
    _check(config)
    videos = find_videos(root, config.split)
    hunyuan = load_hunyuan_vae(config.hunyuan_vae, str(processes.device), DTYPES[config.dtype])
    kvae = load_kandinsky_vae(config.kvae, str(processes.device), DTYPES[config.dtype])
    check_grids(hunyuan.space, kvae.space)
    _check_size(config, kvae.space.space)
    manifest = _open_manifest(out, config, hunyuan, kvae, processes)
    shares = _shares(videos, config)[processes.rank :: processes.count]
    counts, failed = _extract(shares, hunyuan, kvae, config, processes)
    everywhere = processes.gather((counts, failed))
    counts = {key: sum(each[key] for each, _ in everywhere) for key in counts}
    failed = {video: reason for _, each in everywhere for video, reason in each.items()}
    if processes.main:
        write_text(out / MANIFEST, json.dumps(manifest | {"counts": counts, "failed": failed}, indent=2) + "\n")
        for reason in failed.values():
            print(f"skipped: {reason}", file=sys.stderr)
    processes.say(
        f"{counts['extracted']} pairs extracted, {counts['already_there']} already there, {len(failed)} skipped → {out}"
    )
    if not counts["extracted"] and not counts["already_there"]:
        raise UserError(f"{root}: none of the {len(videos)} videos gave a pair")
    return 1 if failed else 0


def _extract(
    shares: list[tuple[Path, int]], hunyuan: VideoVAE, kvae: VideoVAE, config: ExtractConfig, processes: Processes
) -> tuple[dict[str, int], dict[str, str]]:
    """The pairs of these clips of videos; how many there are now, and why some videos gave none."""
    root, out = Path(config.videos_root), Path(config.output_root)
    made, present = 0, 0
    failed: dict[str, str] = {}
    streams = (_jobs(video, clips, root, out, config) for video, clips in shares)
    total = sum(clips for _, clips in shares) * len(_sides(config))
    with (
        tqdm(total=total, desc="extract", unit="clip", disable=None if processes.main else True) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        written: list[Future] = []
        # the published draws are one clip's each: in a batch they would depend on the neighbours
        size = 1 if config.posterior == "sample" else config.batch_size
        for batch in _batched(ahead(streams, DECODERS, size), size):
            bar.update(len(batch))
            for job in batch:
                if job.failure:
                    failed[str(job.clip.video.relative_to(root))] = job.failure
                present += job.frames is None and not job.failure
            jobs = [job for job in batch if job.frames is not None]
            pairs = _encode(jobs, root, hunyuan, kvae, config, processes.device) if jobs else []
            _wait(written)
            written = [writer.submit(write_pair, job.path, pair) for job, pair in zip(jobs, pairs, strict=True)]
            made += len(jobs)
        _wait(written)
    return {"extracted": made, "already_there": present, "skipped": len(failed)}, failed


def _wait(written: list[Future]) -> None:
    for future in written:
        future.result()


def _check(config: ExtractConfig) -> None:
    if config.num_frames < 5:
        raise UserError(f"--num-frames is {config.num_frames}; expected at least 5")
    if config.batch_size < 1:
        raise UserError(f"--batch-size is {config.batch_size}; expected at least 1")
    if config.clips_per_video > 1 and config.sampling == "uniform":
        raise UserError("--sampling uniform spreads one clip over the video; --clips-per-video must be 1")


def _check_size(config: ExtractConfig, multiple: int) -> None:
    for name in ("height", "width"):
        if getattr(config, name) % multiple or getattr(config, name) < 2 * multiple:
            raise UserError(
                f"--{name} is {getattr(config, name)}; expected a multiple of {multiple}, at least {2 * multiple}"
            )


def _open_manifest(out: Path, config: ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE, processes: Processes) -> dict:
    """What every pair in the folder shares. A folder keeps to one set of settings."""
    settings = asdict(config)
    free = "videos_root", "output_root", "split", "max_clips", "mirror", "batch_size", "device", "hunyuan_vae", "kvae"
    for name in free:
        del settings[name]
    manifest: dict = {
        "command": "extract",
        "settings": settings,
        "hunyuan_vae": made_with(hunyuan),
        "kvae": made_with(kvae),
        "config": asdict(config),
    }
    processes.wait()  # none is to find the manifest of another
    old = own_manifest(out)
    processes.wait()
    for key in old:
        same = same_vae(old[key], manifest[key]) if key in VAES else old[key] == manifest[key]
        if not same:
            before, now = without_signature(old[key]), without_signature(manifest[key])
            raise UserError(
                f"{out}: holds pairs made with another {key}: {before}; now {now}. Choose another --output-root"
            )
    if processes.main:
        write_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _shares(videos: list[Path], config: ExtractConfig) -> list[tuple[Path, int]]:
    """The videos, and how many clips at most to take of each; max_clips over all."""
    if not config.max_clips:
        return [(video, config.clips_per_video) for video in videos]
    shares, left = [], config.max_clips
    for video in videos:
        if not left:
            break
        try:
            clips = min(left, len(cut(video, config.num_frames, config.clips_per_video)))
        except UserError:
            clips = 1  # which will fail again, and be told
        shares.append((video, clips))
        left -= clips
    return shares


def _sides(config: ExtractConfig) -> dict[str, bool]:
    """What the names of pairs end in, and whether those are mirrored."""
    return {"": False, ".mirrored": True} if config.mirror == "yes" else {"": False}


def _jobs(video: Path, clips: int, root: Path, out: Path, config: ExtractConfig) -> Iterator[Job]:
    """The clips of one video, decoded once; those that are there already without frames."""
    relative = video.relative_to(root)
    missing: dict[Clip, list[Job]] = {}
    try:
        for i, clip in enumerate(cut(video, config.num_frames, config.clips_per_video)[:clips]):
            stem = relative.stem if config.clips_per_video == 1 else f"{relative.stem}.{i:03d}"
            clip = replace(clip, first=None) if config.sampling == "uniform" else clip
            for end, mirrored in _sides(config).items():
                job = Job(out / relative.parent / (stem + end + SUFFIX), clip, mirrored)
                if job.path.exists():
                    yield job
                else:
                    missing.setdefault(clip, []).append(job)
        if missing:
            read = read_clips(list(missing), config.height, config.width)
            for jobs, frames in zip(missing.values(), read, strict=True):
                for job in jobs:
                    yield replace(job, frames=frames.flip(-1) if job.mirrored else frames)
    except UserError as error:
        yield Job(out / relative, Clip(video, 0, 0), failure=str(error))


def _batched(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Jobs with frames by `size`, each batch of one shape; jobs without frames as they come."""
    batch: list[Job] = []
    for job in jobs:
        if job.frames is None:
            yield [job]
            continue
        if batch and job.frames.shape != batch[0].frames.shape:  # type: ignore[union-attr]
            yield batch
            batch = []
        batch.append(job)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(
    jobs: list[Job], root: Path, hunyuan: VideoVAE, kvae: VideoVAE, config: ExtractConfig, device: torch.device
) -> list[Pair]:
    generator = None
    if config.posterior == "sample":
        clip = jobs[0].clip
        seed = zlib.crc32(f"{config.seed} {clip.video.relative_to(root).as_posix()} {clip.first}".encode())
        generator = torch.Generator(device).manual_seed(seed)
    frames = torch.stack([job.frames for job in jobs])  # type: ignore[misc]
    z_h, z_k = (vae.encode(frames, generator).half().cpu() for vae in (hunyuan, kvae))
    return [Pair(z_h[i], z_k[i], _source(job, root, config)) for i, job in enumerate(jobs)]


def _source(job: Job, root: Path, config: ExtractConfig) -> Source:
    count = job.frames.shape[1]  # type: ignore[union-attr]
    return Source(
        video=job.clip.video.relative_to(root).as_posix(),
        first=job.clip.first,
        frames=count,
        padded=padded_frames(count) - count,
        height=config.height,
        width=config.width,
        mirrored=job.mirrored,
    )
