"""Say what is to be cached, before it is."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..errors import printable
from .plan import FITS, MISSING, OTHER, Plan, Target, buckets_in, bytes_of

FEW = 3  # names in a line
MOST_BUCKETS = 12


def say_plan(plan: Plan, replace: bool, delete_stale: bool) -> None:
    """Print the plan of one dataset."""
    dataset = plan.dataset
    _say(f"{dataset.label}: {len(plan.items)} {dataset.kind}s in {dataset.directory or dataset.jsonl}")
    if dataset.is_video:
        _say_windows(plan)
    buckets = [f"{name} ({count}x)" for name, count in buckets_in(plan).most_common()]
    _say(f"  buckets: {', '.join(buckets[:MOST_BUCKETS]) or 'none'}{', …' if len(buckets) > MOST_BUCKETS else ''}")
    _say_collisions(plan)
    _say_files(plan, replace, delete_stale)
    if dataset.is_video and (dataset.bucket_no_upscale or not dataset.enable_bucket):
        _say(
            "  musubi-tuner up to 0.3.4 trains on videos of these sizes, but its own caching ignores enable_bucket and "
            "bucket_no_upscale: do not run it over this folder"
        )
    if "[" in dataset.cache_directory:
        _say('  the cache directory has a "[" in its name: musubi-tuner 0.3.4 finds nothing in it')


def _say_windows(plan: Plan) -> None:
    counts = Counter(windows for windows, _ in plan.clips.values())
    _say(f"  windows per clip: {', '.join(f'{n} ({counts[n]}x)' for n in sorted(counts)) or 'none'}")
    fitted = "" if plan.dataset.source_fps is None else f" after {plan.dataset.source_fps} was fitted to 24 per second"
    least = min(plan.dataset.target_frames)
    short = [f"{item.path} has {frames}" for item, (windows, frames) in plan.clips.items() if not windows]
    if short:
        _say(f"  too short for {least} frames{fitted}: {_few(short)}")


def _say_collisions(plan: Plan) -> None:
    for target in plan.overwritten[:FEW]:
        kept = plan.targets[target.path].item.path
        _say(f"  collision: {target.item.path} and {kept} both make {target.path.name}; the latter is cached")
    if len(plan.overwritten) > FEW:
        _say(f"  … and {len(plan.overwritten) - FEW} more collisions")
    paths = defaultdict(list)
    for item in plan.items:
        paths[item.stem].append(item.path)
    shared = [f"{', '.join(each[:FEW])}" for each in paths.values() if len(each) > 1]
    if shared:
        _say(f"  one text cache for several media of one name: {_few(shared)}")
    if "" in paths:
        _say(f'  {paths[""][0]}: the names of its caches have no stem; write the folder without "/" at its end')


def _say_files(plan: Plan, replace: bool, delete_stale: bool) -> None:
    fits, other = plan.by_state(FITS), plan.by_state(OTHER)
    to_make = plan.by_state(MISSING) + (other if replace else [])
    free = shutil.disk_usage(_existing(Path(plan.dataset.cache_directory))).free
    _say(
        f"  caches to make: {len(to_make)}, {_mb(to_make)} MB, in {plan.dataset.cache_directory} "
        f"({free / 1e6:,.0f} MB free); there already: {len(fits)}"
    )
    if other:
        what = "made anew" if replace else "kept"
        _say(f"  made otherwise, {what}: {len(other)}: {_few(f'{each.path.name} ({each.why})' for each in other)}")
    if plan.stale:
        what = "deleted at the end" if delete_stale else "kept; musubi-tuner's own caching deletes them"
        _say(f"  stale, {what}: {len(plan.stale)}: {_few(path.name for path in plan.stale)}")
    if plan.failed:
        _say(f"  cannot be read: {_few(plan.failed.values())}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(each))


def _mb(targets: list[Target]) -> str:
    return f"{sum(map(bytes_of, targets)) / 1e6:,.1f}"


def _few(texts: Iterable[str]) -> str:
    texts = list(texts)
    return "; ".join(texts[:FEW]) + (f"; … {len(texts) - FEW} more" if len(texts) > FEW else "")


def _say(line: str) -> None:
    indent = len(line) - len(line.lstrip())
    print(" " * indent + printable(line[indent:]))
