"""Latent pairs from videos: each clip through both VAEs, one file a clip.

    python -m training extract --videos-root UCF101 --output-root latents --hunyuan-vae DIR --kvae DIR
    torchrun --nproc_per_node 8 -m training extract …

Videos are decoded and resized in threads while the VAEs run, and pairs are written while they run on. Several
processes share the videos. What is already there is skipped, so an interrupted run goes on where it stopped, with any
number of processes.
"""

from __future__ import annotations

import errno
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...kvae import WeightsError, padded_frames
from ...serving.fit import CROP, STRETCH
from ...serving.memory import is_out_of_memory
from ..errors import UserError, printable
from ..options import DEVICE, HUNYUAN_HELP, KVAE_HELP, MOST_FRAMES, MOST_SEED, MOST_SIDE, check_values, option
from ..runtime.ahead import ahead
from ..runtime.places import shareable
from ..runtime.processes import Processes
from ..vaes import VideoVAE, check_grids, load_hunyuan_vae, load_kandinsky_vae, made_with
from .manifests import ExtractionManifest, own_manifest
from .pair_names import MIRRORED, PairNames
from .pairs import Pair, Source, pairs_under, write_pair
from .videos import Clip, cut, find_videos, read_clips

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODERS = 4  # threads, one video each
BATCH_SIZE = 4 if DEVICE == "cuda" else 1  # of several clips, a CPU's caches hold less
# of a pair that cannot be written: faults of its name; any other fault is the disk's, and the next pair's too
OF_THE_NAME = {
    *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
}


@dataclass
class ExtractConfig:
    videos_root: str = option(..., "folder of videos; UCF101 or any other")
    output_root: str = option(..., "folder for the pairs; it mirrors the videos' folders", writes="folder")
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP)
    kvae: str = option("tiny", KVAE_HELP)
    split: str = option("all", "part of UCF101 to take", choices=("all", "train", "test"))
    max_clips: int = option(0, "stop after so many clips; 0 for all", least=0)
    clips_per_video: int = option(1, "windows to cut from each video, evenly spaced", least=1)
    mirror: str = option("no", "every window mirrored as well, left to right: twice the pairs", choices=("no", "yes"))
    num_frames: int = option(33, "frames of a clip", least=5, most=MOST_FRAMES)
    height: int = option(240, "pixels, a multiple of 8 or 16, as the VAEs need", least=16, most=MOST_SIDE)
    width: int = option(320, "pixels, a multiple of 8 or 16, as the VAEs need", least=16, most=MOST_SIDE)
    fit: str = option(
        "",
        "how a clip gets that size: its middle, of those proportions, or all of it, stretched, as the published "
        "adapters were trained (default: crop, or what the folder was begun with)",
        choices=(CROP, STRETCH),
    )
    sampling: str = option(
        "consecutive",
        "consecutive frames, or uniform: spread over the whole video, as the published adapters were trained",
        choices=("consecutive", "uniform"),
    )
    posterior: str = option("mode", "latent to keep: the posterior's mode, or a sample", choices=("mode", "sample"))
    seed: int = option(0, "for --posterior sample", least=0, most=MOST_SEED)
    batch_size: int = option(BATCH_SIZE, "clips that go through a VAE at once", least=1)
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
    config = replace(config, fit=config.fit or _begun_with(out))
    videos = find_videos(root, config.split)
    everything = videos if config.split == "all" else find_videos(root)  # a part is named as it is in the whole
    names = PairNames(root, out, everything, config.clips_per_video > 1)
    hunyuan = load_hunyuan_vae(config.hunyuan_vae, str(processes.device), DTYPES[config.dtype])
    kvae = load_kandinsky_vae(config.kvae, str(processes.device), DTYPES[config.dtype])
    check_grids(hunyuan.space, kvae.space)
    _check_size(config, kvae.space.spatial_factor)
    processes.wait()  # none is to find what another has begun
    manifest = ExtractionManifest(out, _described(config, hunyuan, kvae))
    processes.wait()
    extraction = Extraction(config, names, hunyuan, kvae, manifest, processes)
    try:
        extraction.run(_shares(videos, config)[processes.rank :: processes.count])
    except BaseException:
        if processes.count == 1:  # of several, none knows what another is about to write
            manifest.withdraw()
        raise
    everywhere = processes.gather((extraction.counts, extraction.failed))
    counts = {key: sum(each[key] for each, _ in everywhere) for key in extraction.counts}
    failed = {video: reason for _, each in everywhere for video, reason in each.items()}
    counts["skipped"] = len(failed)
    if processes.main:
        for reason in failed.values():
            print(f"skipped: {printable(reason)}".encode(errors="backslashreplace").decode(), file=sys.stderr)
        if counts["extracted"] or counts["already_there"]:
            manifest.write({"counts": counts, "failed": failed})
        else:
            manifest.withdraw()
    processes.say(
        f"{counts['extracted']} pairs extracted, {counts['already_there']} already there, {len(failed)} skipped → {out}"
    )
    if not counts["extracted"] and not counts["already_there"]:
        raise UserError(f"{root}: none of the {len(videos)} videos gave a pair")
    return 1 if failed else 0


@dataclass
class Extraction:
    """The work of one process, and what came of it. What goes wrong with a clip is told of it and ends nothing."""

    config: ExtractConfig
    names: PairNames
    hunyuan: VideoVAE
    kvae: VideoVAE
    manifest: ExtractionManifest
    processes: Processes
    counts: dict[str, int] = field(default_factory=lambda: {"extracted": 0, "already_there": 0})
    failed: dict[str, str] = field(default_factory=dict)  # by video, in its folder

    def run(self, shares: list[tuple[Path, int]]) -> None:
        """The pairs of so many clips of these videos."""
        config = self.config
        streams = (_jobs(video, clips, self.names, config) for video, clips in shares)
        total = sum(clips for _, clips in shares) * len(_sides(config))
        # the published draws are one clip's each: in a batch they would depend on the neighbours
        size = 1 if config.posterior == "sample" else config.batch_size
        with (
            tqdm(total=total, desc="extract", unit="clip", disable=None if self.processes.main else True) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            written: list[tuple[Job, Future]] = []
            for batch in _batched(ahead(streams, DECODERS, size), size):
                bar.update(len(batch))
                for job in batch:
                    self.counts["already_there"] += job.frames is None and not job.failure
                    if job.failure:
                        self._skip(job, job.failure)
                pairs = self._encode([job for job in batch if job.frames is not None])
                self._wait(written)
                if pairs:
                    self.manifest.write_first()
                written = [(job, writer.submit(write_pair, job.path, pair)) for job, pair in pairs]
            self._wait(written)

    def _encode(self, jobs: list[Job]) -> list[tuple[Job, Pair]]:
        """The pairs of some clips of one shape; those of a batch that fails one by one."""
        if not jobs:
            return []
        try:
            pairs = _encode(jobs, self.names.root, self.hunyuan, self.kvae, self.config, self.processes.device)
            return list(zip(jobs, pairs, strict=True))
        except Exception as error:
            if is_out_of_memory(error):  # the next clip, of the same size, would find no more
                raise
            if len(jobs) == 1:
                self._skip(jobs[0], f"{jobs[0].clip.video}: {_reason(error)}")
                return []
        return [pair for job in jobs for pair in self._encode([job])]

    def _wait(self, written: list[tuple[Job, Future]]) -> None:
        """Until these pairs are written.

        Raises:
            WeightsError: the disk is full, or can take no pair for another reason.
        """
        for job, future in written:
            try:
                future.result()
                self.counts["extracted"] += 1
            except Exception as error:
                if is_out_of_memory(error) or _of_the_disk(error):
                    raise
                self._skip(job, f"{job.clip.video}: {_reason(error)}")

    def _skip(self, job: Job, reason: str) -> None:
        reason = reason.replace(f"{self.names.root}{os.sep}", "")  # the manifest goes with the pairs, to other machines
        self.failed.setdefault(job.clip.video.relative_to(self.names.root).as_posix(), reason)


def _reason(error: Exception) -> str:
    """Why a clip gives no pair. What no one has foreseen is said with its type."""
    return str(error) if isinstance(error, UserError | WeightsError) else f"{type(error).__name__}: {error}"


def _of_the_disk(error: Exception) -> bool:
    cause = error.__context__ if isinstance(error, WeightsError) else None
    return isinstance(cause, OSError) and cause.errno not in OF_THE_NAME


def _described(config: ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE) -> dict:
    """What every pair in the folder shares, and the options of this run."""
    settings = asdict(config)
    free = "videos_root", "output_root", "split", "max_clips", "mirror", "batch_size", "device", "hunyuan_vae", "kvae"
    for name in free:
        del settings[name]
    if config.fit == STRETCH:
        del settings["fit"]  # as in folders that are older than the choice
    return {
        "command": "extract",
        "settings": settings,
        "hunyuan_vae": made_with(hunyuan),
        "kvae": made_with(kvae),
        "config": shareable(config),
    }


def _check(config: ExtractConfig) -> None:
    check_values(config)
    if config.clips_per_video > 1 and config.sampling == "uniform":
        raise UserError("--sampling uniform spreads one clip over the video; --clips-per-video must be 1")


def _begun_with(out: Path) -> str:
    """How the clips of the pairs in a folder were brought to their size."""
    manifest = own_manifest(out) if any(pairs_under(out)) else None
    return manifest["settings"].get("fit", STRETCH) if manifest else CROP


def _check_size(config: ExtractConfig, multiple: int) -> None:
    for name in ("height", "width"):
        if getattr(config, name) % multiple or getattr(config, name) < 2 * multiple:
            raise UserError(
                f"--{name} is {getattr(config, name)}; expected a multiple of {multiple}, at least {2 * multiple}"
            )


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
        except Exception:
            clips = 1  # which will fail again, and be told
        shares.append((video, clips))
        left -= clips
    return shares


def _sides(config: ExtractConfig) -> dict[str, bool]:
    """What the names of pairs end in, and whether those are mirrored."""
    return {"": False, MIRRORED: True} if config.mirror == "yes" else {"": False}


def _jobs(video: Path, clips: int, names: PairNames, config: ExtractConfig) -> Iterator[Job]:
    """The clips of one video, decoded once; those that are there already without frames."""
    missing: dict[Clip, list[Job]] = {}
    try:
        for i, clip in enumerate(cut(video, config.num_frames, config.clips_per_video)[:clips]):
            clip = replace(clip, first=None) if config.sampling == "uniform" else clip
            for end, mirrored in _sides(config).items():
                path, there = names.place(video, end if config.clips_per_video == 1 else f".{i:03d}{end}")
                job = Job(path, clip, mirrored)
                if there:
                    yield job
                else:
                    missing.setdefault(clip, []).append(job)
        if missing:
            read = read_clips(list(missing), config.height, config.width, config.fit)
            for jobs, frames in zip(missing.values(), read, strict=True):
                for job in jobs:
                    yield replace(job, frames=frames.flip(-1) if job.mirrored else frames)
    except Exception as error:
        told = isinstance(error, UserError | WeightsError)
        yield Job(video, Clip(video, 0, 0), failure=_reason(error) if told else f"{video}: {_reason(error)}")


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
        key = f"{config.seed} {clip.video.relative_to(root).as_posix()} {clip.first}"
        seed = zlib.crc32(key.encode(errors="surrogatepass"))
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
        fit=config.fit,
    )
