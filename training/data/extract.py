"""Extract latent pairs from videos: encode each clip with both VAEs, and write one file for each clip.

    python -m training extract --videos-root UCF101 --output-root latents --hunyuan-vae DIR --kvae DIR
    torchrun --nproc_per_node 8 -m training extract …

Threads decode and resize videos while the VAEs run, and pairs are written in the background. A GPU is given the next
clips before the latents of the last ones are fetched. Several processes share
the videos. Pairs that exist are skipped. So an interrupted run continues where it stopped, with any number of
processes.
"""

from __future__ import annotations

import errno
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...kvae import WeightsError
from ...serving.fit import CROP, STRETCH
from ...serving.memory import is_out_of_memory
from ..errors import UserError, printable
from ..options import DEVICE, HUNYUAN_HELP, KVAE_HELP, MOST_FRAMES, MOST_SEED, MOST_SIDE, check_values, option
from ..runtime.ahead import ahead
from ..runtime.places import shareable
from ..runtime.processes import Processes
from ..runtime.stages import hidden, tell
from ..vaes import VideoVAE, check_grids, load_hunyuan_vae, load_kvae_for_training, made_with
from .clips import ClipTask, batched, clips_of_videos, pair_endings, read_tasks, reason_of
from .encoding import PendingPair, encode_clips
from .manifests import ExtractionManifest, own_manifest
from .pair_names import PairNames
from .pairs import pairs_under, write_pair
from .precision import AUTO, DTYPES, best_precision, precision_of
from .videos import find_videos

DECODERS = 4  # threads, one video each
BATCH_SIZE = 4 if DEVICE == "cuda" else 1  # several clips do not fit a CPU's caches
# in a manifest's settings: whether HunyuanVideo's VAE encoded in tiles of time; folders that do not say so were
TILES = "temporal_tiles"
# errors of a pair's file name; any other error of writing is the disk's, and would hit the next pair too
NAME_ERRORS = {
    errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP,
}  # fmt: skip
# options that may differ between the pairs of one folder
FREE_OPTIONS = {
    "videos_root", "output_root", "split", "max_clips", "mirror", "batch_size", "device", "hunyuan_vae", "kvae",
}  # fmt: skip


@dataclass
class ExtractConfig:
    videos_root: str = option(..., "folder of videos: UCF101 or any other")
    output_root: str = option(..., "folder for the pairs, in folders named as those of the videos", writes="folder")
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP, metavar="VAE")
    kvae: str = option("tiny", KVAE_HELP, metavar="VAE")
    split: str = option("all", "part of UCF101 to use", choices=("all", "train", "test"))
    max_clips: int = option(0, "largest number of clips; 0 for all", least=0)
    clips_per_video: int = option(1, "largest number of clips to cut from each video, evenly spaced", least=1)
    mirror: str = option("no", "also mirror every clip, left to right: twice the pairs", choices=("no", "yes"))
    num_frames: int = option(33, "frames of a clip", least=5, most=MOST_FRAMES)
    height: int = option(240, "height in pixels, a multiple of 8 or 16, as the VAEs need", least=16, most=MOST_SIDE)
    width: int = option(320, "width in pixels, a multiple of 8 or 16, as the VAEs need", least=16, most=MOST_SIDE)
    fit: str = option(
        "",
        "how frames are resized: crop keeps the middle, stretch keeps all but not the proportions; the published "
        "adapters were trained with stretch (default: crop, or what the folder was begun with)",
        choices=(CROP, STRETCH),
    )
    sampling: str = option(
        "consecutive",
        "frames of a clip: consecutive, or uniform: spread over the whole video, as for the published adapters",
        choices=("consecutive", "uniform"),
    )
    posterior: str = option("mode", "latent to keep: the posterior's mode, or a sample", choices=("mode", "sample"))
    seed: int = option(0, "seed for --posterior sample", least=0, most=MOST_SEED)
    batch_size: int = option(BATCH_SIZE, "clips that go through a VAE at once", least=1)
    device: str = option(DEVICE, "device of both VAEs", metavar="DEVICE")
    dtype: str = option(
        AUTO,
        "precision of both VAEs; auto: what the folder was begun with, or, on CUDA, bfloat16 if it changes the first "
        "clip's latents by less than 1 %% of their variance; else float32",
        choices=(AUTO, *DTYPES),
    )


def run(config: ExtractConfig, videos: list[Path] | None = None) -> int:
    """Extract; return 0, or 1 if clips were skipped.

    Args:
        videos: of the folder, in the place of those of --split.

    Raises:
        UserError: an option is out of range, no adapter can join the grids of the VAEs, or no video gave a pair.
        WeightsError: a VAE cannot be read, or a pair cannot be written.
    """
    processes = Processes(config.device)
    _check_options(config)
    root = Path(config.videos_root)
    videos = find_videos(root, config.split) if videos is None else videos
    extraction = prepare(config, videos, processes)
    try:
        extraction.run(clips_of_videos(videos, config)[processes.rank :: processes.count])
    except BaseException:
        if processes.count == 1:  # with several, another process may be about to write a pair
            extraction.manifest.withdraw()
        raise
    counts, failed = extraction.totals()
    _finish(extraction.manifest, counts, failed, processes)
    done = f"{counts['extracted']} pairs extracted, {counts['already_there']} already there, {len(failed)} skipped"
    processes.say(f"{done} → {config.output_root}")
    if not counts["extracted"] and not counts["already_there"]:
        raise UserError(f"{root}: none of the {len(videos)} videos gave a pair")
    return 1 if failed else 0


def prepare(config: ExtractConfig, videos: list[Path], processes: Processes) -> Extraction:
    """Load both VAEs, choose their precision, and check that the folder of pairs can go on.

    Raises:
        UserError, WeightsError: as `run`, or the folder holds pairs made in another way.
    """
    root, out = Path(config.videos_root), Path(config.output_root)
    begun = _settings_of(out)
    fit = config.fit or (begun.get("fit", STRETCH) if begun else CROP)
    tiles = bool(begun) and begun.get(TILES) is not False
    config = replace(config, fit=fit, dtype=precision_of(config.dtype, begun, processes.device))
    names = PairNames(root, out, find_videos(root), config.clips_per_video > 1)  # of a split, named as those of all
    hunyuan, kvae = _load_vaes(config, processes.device, tiles)
    if config.dtype == AUTO:
        config = replace(config, dtype=best_precision(_first_frames(videos, names, config), (hunyuan, kvae), processes))
        if config.dtype == "float32":
            hunyuan, kvae = _load_vaes(config, processes.device, tiles)
    processes.wait()  # no process may find what another one has begun
    manifest = ExtractionManifest(out, _described(config, hunyuan, kvae, tiles))
    processes.wait()
    return Extraction(config, names, hunyuan, kvae, manifest, processes)


def _load_vaes(config: ExtractConfig, device: torch.device, tiles: bool) -> tuple[VideoVAE, VideoVAE]:
    """Both VAEs, checked; in float32 if the precision is not chosen yet.

    Args:
        tiles: whether HunyuanVideo's VAE encodes in tiles of time.

    Raises:
        UserError: no adapter can join the grids of the VAEs, or --height or --width does not fit them.
        WeightsError: a VAE cannot be read.
    """
    dtype = DTYPES.get(config.dtype, torch.float32)
    hunyuan = load_hunyuan_vae(config.hunyuan_vae, str(device), dtype, tiles)
    kvae = load_kvae_for_training(config.kvae, str(device), dtype)
    check_grids(hunyuan.space, kvae.space)
    _check_size(config, max(hunyuan.space.spatial_factor, kvae.space.spatial_factor))
    return hunyuan, kvae


def _first_frames(videos: list[Path], names: PairNames, config: ExtractConfig) -> Tensor | None:
    """The frames of the first clip that can be read, uint8 [3, T, H, W]; None if there is none."""
    tasks = (task for video in videos for task in read_tasks(video, 1, names, config))
    return next((task.frames for task in tasks if task.frames is not None), None)


def _finish(manifest: ExtractionManifest, counts: dict[str, int], failed: dict[str, str], processes: Processes) -> None:
    """Print what was skipped, and complete the manifest."""
    if not processes.main:
        return
    for reason in failed.values():
        print(f"skipped: {printable(reason)}", file=sys.stderr)
    if counts["extracted"] or counts["already_there"]:
        manifest.write({"counts": counts, "failed": failed})
    else:
        manifest.withdraw()


@dataclass
class Extraction:
    """The videos of one process, and the results. A clip that fails is reported, and the other clips are extracted."""

    config: ExtractConfig
    names: PairNames
    hunyuan: VideoVAE
    kvae: VideoVAE
    manifest: ExtractionManifest
    processes: Processes
    counts: dict[str, int] = field(default_factory=lambda: {"extracted": 0, "already_there": 0})
    failed: dict[str, str] = field(default_factory=dict)  # reasons, by the video's path in its folder

    def run(self, shares: list[tuple[Path, int]]) -> None:
        """Extract these videos, each with the largest number of clips to cut from it.

        Raises:
            WeightsError: the disk is full, or cannot be written for another reason.
        """
        config = self.config
        streams = (read_tasks(video, clips, self.names, config) for video, clips in shares)
        total = sum(clips for _, clips in shares) * len(pair_endings(config))
        # each clip draws its own sample, as in the published pairs: in a batch, it would depend on its neighbours
        size = 1 if config.posterior == "sample" else config.batch_size
        with (
            tqdm(total=total, desc="extract", unit="clip", disable=hidden(self.processes.main)) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            done, written = 0, list[tuple[ClipTask, Future]]()
            for batch in batched(ahead(streams, DECODERS, size), size):
                bar.update(len(batch))
                done += len(batch)
                tell(min(1, done / total))
                for task in batch:
                    self.counts["already_there"] += task.frames is None and not task.failure
                    if task.failure:
                        self._skip(task, task.failure)
                pairs = self._encode([task for task in batch if task.frames is not None])
                self._wait(written)
                if pairs:
                    self.manifest.write_first()
                written = [(task, writer.submit(_write, task.path, pair)) for task, pair in pairs]
            self._wait(written)

    def totals(self) -> tuple[dict[str, int], dict[str, str]]:
        """Counts and failures over all processes."""
        everywhere = self.processes.gather((self.counts, self.failed))
        counts = {key: sum(each[key] for each, _ in everywhere) for key in self.counts}
        failed = {video: reason for _, each in everywhere for video, reason in each.items()}
        return counts | {"skipped": len(failed)}, failed

    def _encode(self, tasks: list[ClipTask]) -> list[tuple[ClipTask, PendingPair]]:
        """The pairs of clips of one shape. If a batch fails, its clips are encoded one by one."""
        if not tasks:
            return []
        try:
            vaes = self.hunyuan, self.kvae
            pairs = encode_clips(tasks, self.names.root, vaes, self.config, self.processes.device)
            return list(zip(tasks, pairs, strict=True))
        except Exception as error:
            if is_out_of_memory(error):  # the next clip has the same size and would fail too
                raise
            if len(tasks) == 1:
                self._skip(tasks[0], f"{tasks[0].clip.video}: {reason_of(error)}")
                return []
        return [pair for task in tasks for pair in self._encode([task])]

    def _wait(self, written: list[tuple[ClipTask, Future]]) -> None:
        """Wait until these pairs are written.

        Raises:
            WeightsError: the disk is full, or cannot be written for another reason.
        """
        for task, future in written:
            try:
                future.result()
                self.counts["extracted"] += 1
            except Exception as error:
                if is_out_of_memory(error) or is_disk_error(error):
                    raise
                self._skip(task, f"{task.clip.video}: {reason_of(error)}")

    def _skip(self, task: ClipTask, reason: str) -> None:
        # the manifest travels with the pairs to other machines, so it names no folder of this one
        reason = reason.replace(f"{self.names.root}{os.sep}", "")
        self.failed.setdefault(task.clip.video.relative_to(self.names.root).as_posix(), reason)


def is_disk_error(error: Exception) -> bool:
    """Whether an error of writing a pair is the disk's, so that the next pair would fail too."""
    cause = error.__context__ if isinstance(error, WeightsError) else None
    return isinstance(cause, OSError) and cause.errno not in NAME_ERRORS


def _write(path: Path, pair: PendingPair) -> None:
    """Wait for the latents of a pair, and write it."""
    write_pair(path, pair())


def _described(config: ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE, tiles: bool) -> dict:
    """The content of the manifest: settings that all pairs of the folder share, both VAEs, options of this run."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_OPTIONS}
    if config.fit == STRETCH:
        del settings["fit"]  # as in folders that are older than the option
    if not tiles:
        settings[TILES] = False
    return {
        "command": "extract",
        "settings": settings,
        "hunyuan_vae": made_with(hunyuan),
        "kvae": made_with(kvae),
        "config": shareable(config),
    }


def _check_options(config: ExtractConfig) -> None:
    check_values(config)
    if config.clips_per_video > 1 and config.sampling == "uniform":
        raise UserError("--sampling uniform spreads one clip over the video; --clips-per-video must be 1")


def _settings_of(out: Path) -> dict:
    """The settings of the pairs that a folder has; empty for a new folder."""
    return own_manifest(out).get("settings", {}) if any(pairs_under(out)) else {}


def _check_size(config: ExtractConfig, multiple: int) -> None:
    for name in ("height", "width"):
        if getattr(config, name) % multiple or getattr(config, name) < 2 * multiple:
            raise UserError(
                f"--{name} is {getattr(config, name)}; expected a multiple of {multiple}, at least {2 * multiple}"
            )
