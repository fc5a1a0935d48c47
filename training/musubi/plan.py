"""What is to be cached of a dataset: which windows of which clips, in which files, and what stands in the way."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from tqdm import tqdm

from ...kvae import WeightsError
from ...serving.architectures import Architecture
from ..data.clips import reason_of
from .buckets import Size, bucket_chooser
from .cache_files import MADE_HERE, CacheName, latent_frames, read_cache_header, tensor_shapes
from .config import Dataset
from .encoders import nabla_size
from .frames import Media, probe
from .items import Item, find_items
from .windows import Window, used_frames, windows_of

PROBES = 4  # threads
MISSING, FITS, OTHER = "missing", "fits", "other"


@dataclass(frozen=True)
class Wanted:
    """What all caches of a run have in common.

    Attributes:
        made_by: texts that the metadata of each cache must have, or it was made by another encoder.
    """

    architecture: Architecture
    i2v: bool
    nabla: bool
    made_by: dict[str, str]


@dataclass
class Target:
    """A cache file that a run makes, or finds.

    Attributes:
        window: None for an image.
        bucket: the size of the frames.
        height, width: what they are stretched to before they are encoded.
        texts: what the file's metadata must say, or it was made of something else, or otherwise.
        shapes: of the file's tensors, by key.
        state: MISSING, FITS or OTHER.
        why: what makes a file OTHER.
    """

    path: Path
    name: CacheName
    item: Item
    window: Window | None
    bucket: Size
    height: int
    width: int
    texts: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    state: str = MISSING
    why: str = ""

    @property
    def frames(self) -> int:
        return self.window.frames if self.window else 1


@dataclass
class Plan:
    """What is to be cached of one dataset.

    Attributes:
        targets: by their paths.
        clips: the number of windows of each clip that can be read, and its used frames.
        positions: of the used frames in the file, by item.
        failed: items that cannot be read or encoded, with the reason.
        overwritten: targets that a later item with the same file name replaces.
        stale: caches that no target names.
    """

    dataset: Dataset
    items: list[Item]
    targets: dict[Path, Target] = field(default_factory=dict)
    clips: dict[Item, tuple[int, int]] = field(default_factory=dict)
    positions: dict[Item, Sequence[int]] = field(default_factory=dict)
    failed: dict[Item, str] = field(default_factory=dict)
    overwritten: list[Target] = field(default_factory=list)
    stale: list[Path] = field(default_factory=list)

    def by_state(self, state: str) -> list[Target]:
        return [target for target in self.targets.values() if target.state == state]


def make_plan(dataset: Dataset, wanted: Wanted) -> Plan:
    """Look at all media of a dataset, and at the caches that are there.

    Raises:
        UserError, WeightsError: as `find_items`; or the cache directory cannot be read.
    """
    plan = Plan(dataset, find_items(dataset))
    choose = bucket_chooser(dataset)
    for item, media in tqdm(
        _probed(plan.items, dataset.is_video), "look at media", len(plan.items), leave=False, delay=1
    ):
        try:
            _add(plan, item, media(), choose, wanted)
        except Exception as error:
            plan.failed[item] = reason_of(error)
    for target in plan.targets.values():
        _compare(target)
    plan.stale = list(_stale(plan, wanted.architecture.short))
    return plan


def _probed(items: list[Item], is_video: bool) -> Iterator[tuple[Item, Callable[[], Media]]]:
    """Each item with a function that returns what is known of it, or raises."""
    with ThreadPoolExecutor(PROBES) as pool:
        futures = [(item, pool.submit(probe, item.path, is_video)) for item in items]
        try:
            for item, future in futures:
                yield item, future.result
        finally:
            pool.shutdown(cancel_futures=True)


def _add(plan: Plan, item: Item, media: Media, choose: Callable[[Size], Size], wanted: Wanted) -> None:
    """Add the targets of an item."""
    bucket, side = choose(media.size), wanted.architecture.space.spatial_factor
    if min(bucket) < side:
        raise ValueError(f"{item.path}: {bucket[0]}x{bucket[1]} pixels; expected {side}x{side} at least")
    windows: list[Window | None] = [None]
    if plan.dataset.is_video:
        plan.positions[item] = used_frames(media.frames, plan.dataset)
        windows = [*windows_of(len(plan.positions[item]), plan.dataset)]
    plan.clips[item] = len(windows), len(plan.positions.get(item, range(1)))
    for window in windows:
        target = _target(plan.dataset, item, media, window, bucket, wanted)
        if target.path in plan.targets:
            plan.overwritten.append(plan.targets[target.path])
        plan.targets[target.path] = target


def _target(dataset: Dataset, item: Item, media: Media, window: Window | None, bucket: Size, wanted: Wanted) -> Target:
    start, frames = (window.start, window.frames) if window else (0, None)
    name = CacheName(item.stem, start, frames, *(bucket if window else media.size), wanted.architecture.short)
    width, height = bucket
    height, width = nabla_size(height, width) if wanted.nabla else (height, width)
    texts = {
        "kvae_source": os.path.basename(item.path.rstrip("/")),
        "kvae_source_bytes": str(media.bytes),
        "kvae_source_fps": str(dataset.source_fps or ""),
    }
    path = Path(dataset.cache_directory, name.file_name)
    shapes = _shapes(wanted, frames or 1, height, width)
    return Target(path, name, item, window, bucket, height, width, wanted.made_by | texts, shapes)


def _shapes(wanted: Wanted, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a cache, by key."""
    architecture, side = wanted.architecture, wanted.architecture.space.spatial_factor
    grid = latent_frames(frames, architecture), -(-height // side), -(-width // side)
    return tensor_shapes(architecture, grid, wanted.i2v)


def _compare(target: Target) -> None:
    """Find out whether the file of a target is there, and fits."""
    if not target.path.exists():
        return
    try:
        header = read_cache_header(target.path)
    except WeightsError:  # cut short by a crash of what wrote it: nothing is lost if it is made anew
        return
    said = {key: header.metadata.get(key) for key in target.texts}
    if header.shapes.keys() != target.shapes.keys():
        target.state, target.why = OTHER, f"holds {', '.join(sorted(header.shapes))[:120]}"
    elif MADE_HERE not in header.metadata:
        target.state, target.why = OTHER, "another program made it"
    elif said != target.texts:
        key = next(key for key, text in target.texts.items() if said[key] != text)
        target.state, target.why = OTHER, f"{key} is {said[key]}, not {target.texts[key]}"
    else:
        target.state = FITS


def _stale(plan: Plan, short: str) -> Iterator[Path]:
    """Caches of this model that no target names. Those of a clip that cannot be read now are none."""
    failed = {item.stem for item in plan.failed}
    pattern = os.path.join(glob.escape(plan.dataset.cache_directory), f"*_{short}.safetensors")
    for path in map(Path, sorted(glob.glob(pattern))):
        try:
            stem = CacheName.parse(path.name).stem
        except ValueError:
            stem = ""
        if path not in plan.targets and stem not in failed:
            yield path


def bytes_of(target: Target) -> int:
    """The size of a cache file, without its header."""
    return sum(prod(shape) * (4 if key.endswith("float32") else 2) for key, shape in target.shapes.items())


def buckets_in(plan: Plan) -> Counter[str]:
    """How many targets each bucket has, by its name."""
    names = []
    for target in plan.targets.values():
        width, height = target.bucket
        names.append(f"{width}x{height}" + (f"x{target.frames}" if target.window else ""))
    return Counter(names)
