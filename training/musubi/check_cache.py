"""Check a folder of musubi-tuner's latent caches: one line for each fault, and exit code 1 if there is any.

    python -m training check-cache DIR
    python -m training check-cache DIR --dataset-config data.toml --hunyuan-vae DIR
    python -m training check-cache DIR --dataset-config data.toml --hunyuan-vae DIR --repair

Headers come first and take seconds, values after them. With the dataset config, missing and stale caches and wrong
buckets are found, too; with a VAE, also caches of Kandinsky 5 that are warped in time. --repair makes wrong caches anew
as `cache` does; an old file is replaced when the new one is complete, and nothing is deleted.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...serving.architectures import Architecture
from ..errors import UserError, printable
from ..options import HUNYUAN_HELP, argument, option
from .cache_faults import Fault
from .config import Dataset, read_config
from .encoders import HUNYUAN, EncoderOptions
from .folder_faults import Folder, listing_faults, read_folder
from .plan import Plan
from .repair import make_anew, plans_for
from .time_warp import find_warped
from .value_faults import Values, read_values, scale_faults


@dataclass(kw_only=True)
class CheckCacheConfig(EncoderOptions):
    folder: str = argument("folder of caches", "DIR")
    dataset_config: str = option("", "musubi-tuner's dataset config, .toml or .json, with this cache_directory")
    hunyuan_vae: str = option("", HUNYUAN_HELP, metavar="VAE")
    image_encoder: str = option("", "for --repair of image-to-video caches: SigLIP's vision model, as for cache")
    repair: bool = option(False, "make caches anew that are wrong or missing; needs --dataset-config and a VAE")

    @property
    def has_vae(self) -> bool:
        return self.encoder != HUNYUAN or bool(self.hunyuan_vae)


def run(config: CheckCacheConfig) -> int:
    """Check a folder; return 0, or 1 if there are faults that were not mended.

    Raises:
        UserError: the folder holds no caches, or an option does not fit.
        WeightsError: the folder, the dataset config or a VAE cannot be read.
    """
    path = Path(config.folder)
    if config.repair and not (config.dataset_config and config.has_vae):
        raise UserError("--repair needs --dataset-config, and --hunyuan-vae or --encoder kvae")
    dataset = _dataset(config.dataset_config, path) if config.dataset_config else None
    folder = read_folder(path, dataset)
    if not folder.caches and not folder.faults:
        raise UserError(f"{path}: no latent caches; expected files such as clip_00000-017_0960x0544_hv.safetensors")
    plans = plans_for(folder, dataset) if dataset else {}
    folder.faults += _listed(folder, plans)
    for fault in sorted(folder.faults, key=lambda fault: fault.file):
        _say(str(fault))
    note = _check_values(folder, plans, config)
    mended = make_anew(folder, plans, config, config.image_encoder) if config.repair else set()
    for reason in [reason for plan in plans.values() for reason in plan.failed.values()]:
        tqdm.write(f"skipped: {printable(reason)}", file=sys.stderr)
    left = {fault.file for fault in folder.faults if not (fault.again and fault.file in mended)}
    _summarise(folder, left, mended, note)
    return 1 if left else 0


def _dataset(file: str, folder: Path) -> Dataset:
    """The dataset of a config whose caches are in this folder."""
    datasets = read_config(file)
    for dataset in datasets:
        if os.path.realpath(dataset.cache_directory) == os.path.realpath(folder):
            return dataset
    known = ", ".join(dataset.cache_directory for dataset in datasets[:3])
    raise UserError(f"{file}: no dataset has the cache_directory {folder}; expected one of {known}")


def _listed(folder: Folder, plans: dict[Architecture, Plan]) -> list[Fault]:
    names = {path.name for plan in plans.values() for path in plan.targets}
    unread = {item.stem for plan in plans.values() for item in plan.failed}
    return [*listing_faults(folder, names, unread)] if plans else []


def _check_values(folder: Folder, plans: dict[Architecture, Plan], config: CheckCacheConfig) -> str:
    """Check the values of all caches whose headers are in order; return what could not be checked."""
    found: list[Values] = []
    with tqdm(folder.sound(), "values", unit="file", disable=None) as bar:
        for file in bar:
            values, faults = read_values(file)
            if values and not faults:
                found.append(values)
            _add(folder, faults)
    _add(folder, list(scale_faults(found)))
    wrong = {fault.file for fault in folder.faults if fault.again}
    sound = [each for each in found if each.file.path.name not in wrong]
    faults, note = find_warped(sound, plans, config if config.has_vae else None)
    _add(folder, faults)
    return note


def _add(folder: Folder, faults: list[Fault]) -> None:
    for fault in faults:
        folder.faults.append(fault)
        _say(str(fault))


def _say(line: str) -> None:
    tqdm.write(printable(line))


def _summarise(folder: Folder, left: set[str], mended: set[str], note: str) -> None:
    kinds = Counter(file.architecture.name for file in folder.caches.values())
    counts = ", ".join(f"{count} of {name}" for name, count in kinds.items()) or "none that can be read"
    others = ", ".join(f"*_{short} ({count})" for short, count in folder.others.most_common(5))
    _say(f"caches: {counts}" + (f"; left aside: {others}" if others else ""))
    if note:
        _say(note)
    _say(f"{len(left)} files with faults" + (f", {len(mended)} made anew" if mended else ""))
