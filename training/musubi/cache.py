"""Make musubi-tuner's latent caches from its dataset config.

    python -m training cache --dataset-config data.toml --architecture kandinsky5 --hunyuan-vae DIR
    python -m training cache --dataset-config data.toml --architecture hunyuan_video --encoder kvae --kvae DIR \\
        --adapter-k2h FILE

Names, tensors and metadata are musubi-tuner's, so that its own caching with --skip_existing finds nothing to do. First
comes a list of what is to be made; with --dry-run, nothing else. Caches that are there and fit are kept, so that the
same command continues what was interrupted.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from ...kvae.paths import file_errors
from ...serving.architectures import CACHED, Architecture
from ...serving.memory import is_out_of_memory
from ..data.clips import reason_of
from ..data.extract import is_disk_error
from ..errors import UserError, printable
from ..options import option
from ..vaes import tiny_file
from .cache_files import FirstFrame, write_cache
from .config import Dataset, read_config
from .encoders import KVAE, Encoder, EncoderOptions, load_encoder, made_by
from .frames import opencv, read_image, read_windows
from .items import Item
from .plan import FITS, OTHER, Plan, Target, Wanted, make_plan
from .say_plan import say_plan
from .siglip import Siglip
from .windows import Window

T = TypeVar("T")
Frames = list[np.ndarray]  # uint8 [H, W, 3]


@dataclass(kw_only=True)
class CacheConfig(EncoderOptions):
    dataset_config: str = option(..., "musubi-tuner's dataset config, .toml or .json")
    architecture: str = option(..., "the model that is to be trained", choices=tuple(CACHED))
    i2v: bool = option(False, "hunyuan_video_1.5: also cache the first frame of each clip, to train image to video")
    image_encoder: str = option("", "for --i2v: SigLIP's vision model, a folder or a .safetensors file")
    nabla_resize: bool = option(False, "kandinsky5: stretch frames to the next multiples of 128 pixels")
    replace: bool = option(False, "make caches anew that are there but were made otherwise, which is an error without")
    delete_stale: bool = option(False, "delete caches of this model that the dataset config does not name, at the end")
    dry_run: bool = option(False, "only say what would be done")


def run(config: CacheConfig) -> int:
    """Cache all datasets; return 0, or 1 if clips were skipped.

    Raises:
        UserError: an option or the dataset config does not fit, no clip has a window, or a cache that is there was
            made otherwise.
        WeightsError: a VAE cannot be read, or a cache cannot be written.
    """
    datasets = read_config(config.dataset_config)
    _check_options(config, datasets)
    opencv()
    architecture = CACHED[config.architecture]
    caching = load_caching(config, architecture, config.nabla_resize, config.image_encoder)
    plans = [make_plan(dataset, caching.wanted) for dataset in datasets]
    print(f"encoder: {_described(config)}")
    for plan in plans:
        say_plan(plan, config.replace, config.delete_stale)
    if not config.dry_run:
        _check_plans(plans, config.replace)
        caching.run(plans)
        _delete_stale(plans, config.delete_stale)
    failed = {path: reason for plan in plans for path, reason in plan.failed.items()}
    for reason in failed.values():
        print(f"skipped: {printable(reason)}", file=sys.stderr)
    if not config.dry_run:
        print(f"{caching.made} caches made, {caching.kept} already there, {len(failed)} media skipped")
    return 1 if failed else 0


def load_caching(options: EncoderOptions, architecture: Architecture, nabla: bool, image_encoder: str) -> Caching:
    """Load what encodes clips.

    Args:
        nabla: whether frames are stretched to multiples of 128 pixels.
        image_encoder: SigLIP's vision model, for caches that train image to video; "" for others.

    Raises:
        UserError, WeightsError: as `load_encoder`; or the image encoder cannot be read.
    """
    posterior = "mode" if architecture.first_frame or options.encoder == KVAE else "sample"
    texts = made_by(options, architecture.space.name) | {"kvae_posterior": posterior}
    siglip = Siglip(image_encoder, options.device) if image_encoder else None
    wanted = Wanted(architecture, bool(siglip), nabla, texts)
    return Caching(wanted, load_encoder(options, architecture.space), siglip)


def _described(config: CacheConfig) -> str:
    if config.encoder == KVAE:
        tiny = tiny_file(config.kvae, "kvae")
        text = f"KVAE {config.kvae}, with the adapter {config.adapter_k2h or config.kvae}"
    else:
        tiny = tiny_file(config.hunyuan_vae, "hunyuan")
        text = f"the VAE of {config.architecture}, {config.hunyuan_vae}"
    return text + ("; it is for trying this command only: do not train on its latents" if tiny else "")


def _check_options(config: CacheConfig, datasets: list[Dataset]) -> None:
    architecture = CACHED[config.architecture]
    if config.i2v and not architecture.first_frame:
        raise UserError(f"--i2v is for hunyuan_video_1.5; caches of {config.architecture} need nothing more for it")
    if config.i2v != bool(config.image_encoder):
        raise UserError("--i2v and --image-encoder go together: one was given without the other")
    images = [each.label for each in datasets if not each.is_video]
    if config.i2v and images:
        raise UserError(f"--i2v caches the first frames of videos; {images[0]} is of images")
    if config.nabla_resize and config.architecture != "kandinsky5":
        raise UserError("--nabla-resize is for kandinsky5")


def _check_plans(plans: list[Plan], replace: bool) -> None:
    """Refuse to mix latents of two encoders, or to lose some."""
    targets = [target for plan in plans for target in plan.targets.values()]
    others = [target for target in targets if target.state == OTHER]
    if others and not replace:
        raise UserError(
            f"{others[0].path}: {others[0].why}; {len(others)} such caches are there: make them anew with --replace, "
            "or choose another cache_directory"
        )
    if not targets:
        counts = f"{sum(len(plan.failed) for plan in plans)} cannot be read, the others are too short"
        raise UserError(f"nothing to cache in {sum(len(plan.items) for plan in plans)} media: {counts}")


def _delete_stale(plans: list[Plan], wanted: bool) -> None:
    for path in [path for plan in plans for path in plan.stale if wanted]:
        with file_errors(path):
            path.unlink()


@dataclass
class Caching:
    """One run over all datasets. A clip that fails is reported, and the others are cached."""

    wanted: Wanted
    encoder: Encoder
    siglip: Siglip | None
    made: int = 0
    kept: int = field(default=0, init=False)

    def run(self, plans: list[Plan]) -> None:
        """Make the caches that are missing.

        Raises:
            WeightsError: the disk is full, or cannot be written for another reason.
        """
        self.kept = sum(len(plan.by_state(FITS)) for plan in plans)
        total = sum(target.frames for plan in plans for target in plan.targets.values() if target.state != FITS)
        with tqdm(total=total, desc="cache", unit="frame") as bar:
            for plan in plans:
                for target, frames in _one_ahead(_read(plan)):
                    self._cache(plan, target, frames)
                    bar.update(target.frames)

    def _cache(self, plan: Plan, target: Target, frames: Frames) -> None:
        """Encode and write one cache; if that fails, note why."""
        try:
            self._write(target, frames)
            self.made += 1
        except Exception as error:
            if is_out_of_memory(error) or is_disk_error(error):
                raise  # the next one would fail too
            plan.failed[target.item] = f"{target.item.path}: {reason_of(error)}"

    def _write(self, target: Target, frames: Frames) -> None:
        texts, sides = target.texts, (target.height, target.width)
        seed = zlib.crc32(os.fsencode(target.path.name)) if texts["kvae_posterior"] == "sample" else None
        z = self.encoder.encode(frames, *sides, seed)
        first = None
        if self.siglip:
            first = FirstFrame(self.encoder.encode(frames[:1], *sides, seed), self.siglip(frames[0]))
        name, count = target.name, target.name.frames
        write_cache(target.path, self.wanted.architecture, z, name.width, name.height, count, first, texts)


def _read(plan: Plan) -> Iterator[tuple[Target, Frames]]:
    """The frames of all targets that are to be made. An item that cannot be read is noted, and left out."""
    missing = defaultdict[Item, dict[Window | None, Target]](dict)
    for target in plan.targets.values():
        if target.state != FITS:
            missing[target.item][target.window] = target
    for item, targets in missing.items():
        bucket = next(iter(targets.values())).bucket
        try:
            if None in targets:
                yield targets[None], [read_image(item.path, bucket)]
            else:
                windows = [window for window in targets if window]
                for window, frames in read_windows(item.path, plan.positions[item], windows, bucket):
                    yield targets[window], frames
        except Exception as error:
            if is_out_of_memory(error):
                raise
            plan.failed[item] = reason_of(error)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while this one is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
            del item
