"""Encode the prompts and the pictures of a Video-Free LoRA once, so that training needs no encoder.

    python -m training vfl-cache --base hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v \\
        --data-root dataset --cache-root cache

The encoders take about 16 GB in bfloat16. What is in the cache already is not encoded again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ...serving.dtypes import DTYPES
from ..errors import UserError, printable
from ..options import DEVICE, option
from ..runtime.places import shareable
from ..runtime.processes import Processes
from ..served import AUTO
from .base import load_encoders
from .condition_files import CacheInfo, ConditionFiles, begin_cache, digest_of, keep
from .conditions import encode_picture, encode_text
from .index import Index
from .pictures import PictureError, cropped, read_picture
from .prompts import BANK, PromptBank
from .shards import IDENTITY_KEY, SPLITS, shard_files

MOST_PROMPTS = 20_000  # at 0.5 MB each
EMPTY = ""  # the prompt that guidance is relative to


@dataclass
class VflCacheConfig:
    base: str = option(..., "image-to-video pipeline of HunyuanVideo 1.5: folder or hub id", metavar="MODEL")
    data_root: str = option(..., "data set, from vfl-pack; the split val may be missing")
    cache_root: str = option(..., "folder of the cache", writes="folder")
    prompts: str = option("", "bank of prompts, JSON; without it, the one that comes with the code")
    crops_per_picture: int = option(1, "parts of each training picture; 1 is the whole picture", least=1, most=64)
    crop_ratio: float = option(0.92, "length of a part, as a share of the picture's long side", above=0, most=1)
    crop_jitter: float = option(
        0.04, "how far a part may lie from the centre, as a share of its length", least=0, most=1
    )
    identity_key: str = option(IDENTITY_KEY, "key of the identity in a sample's JSON", metavar="KEY")
    dtype: str = option(AUTO, "precision of the encoders; auto is bf16 on a GPU, else fp32", choices=(AUTO, *DTYPES))
    device: str = option(DEVICE, "device of the encoders", metavar="DEVICE")


class View(NamedTuple):
    """A part of a picture to encode. `crop` is None for validation's whole pictures."""

    source: Index
    identity: int
    number: int
    crop: int | None


def run(config: VflCacheConfig) -> int:
    """Encode what the cache lacks; return 0, or 1 if some pictures could not be read.

    Raises:
        UserError: the base, the data set or the bank cannot be used.
        WeightsError: something cannot be read or written.
    """
    bank = PromptBank(config.prompts or BANK)
    if len(bank) > MOST_PROMPTS:
        raise UserError(
            f"the bank makes {len(bank):,} prompts; expected {MOST_PROMPTS:,} at most, so shorten its lists"
        )
    views = list(_views(config))
    processes = Processes(config.device)
    pipe = load_encoders(config.base, str(processes.device), _dtype(config.dtype, processes.device))
    cropping = (config.crops_per_picture, config.crop_ratio, config.crop_jitter)
    info = CacheInfo(
        shareable(config)["base"], digest_of(pipe), pipe.target_size, *(cropping if cropping[0] > 1 else ())
    )
    if processes.main:
        begin_cache(Path(config.cache_root), info)
    processes.wait()
    files = ConditionFiles(Path(config.cache_root), info)
    mine = slice(processes.rank, None, processes.count)
    texts = _encode_texts(pipe, [EMPTY, *bank.prompts()][mine], files, processes.main)
    pictures, skipped = _encode_pictures(pipe, views[mine], files, processes.main)
    for line in skipped:
        print(printable(f"skipped: {line}"), file=sys.stderr)
    totals = [sum(each) for each in zip(*processes.gather((texts, pictures, len(skipped))), strict=True)]
    processes.say(
        f"{totals[0]:,} of {len(bank) + 1:,} prompts and {totals[1]:,} of {len(views):,} views of pictures encoded, "
        f"{totals[2]:,} skipped, the others were there → {config.cache_root}"
    )
    return 1 if totals[2] else 0


def _views(config: VflCacheConfig) -> Iterator[View]:
    for split in SPLITS:
        if split != SPLITS[0] and not shard_files(Path(config.data_root), split):
            continue  # a data set need not have pictures for validation
        index = Index(config.data_root, split, config.identity_key)
        crops = range(config.crops_per_picture) if split == SPLITS[0] and config.crops_per_picture > 1 else [None]
        for identity, count in enumerate(index.counts):
            yield from (View(index, identity, i, crop) for i in range(count) for crop in crops)


def _encode_texts(pipe: Any, prompts: list[str], files: ConditionFiles, shown: bool) -> int:
    left = [prompt for prompt in prompts if not files.text_path(prompt).exists()]
    for prompt in tqdm(left, "prompts", unit="prompt", disable=None if shown else True):
        keep(files.text_path(prompt), encode_text(pipe, prompt))
    return len(left)


def _encode_pictures(pipe: Any, views: list[View], files: ConditionFiles, shown: bool) -> tuple[int, list[str]]:
    """How many were encoded, and those that cannot be read."""
    made, skipped = 0, {}
    for view in tqdm(views, "pictures", unit="view", disable=None if shown else True):
        sample = view.source.at(view.identity, view.number, bytes)
        try:
            picture = read_picture(sample.picture)
        except PictureError as error:
            skipped[sample.id] = f"{sample.id}: {error}"
            continue
        height, width = picture.shape[1:]
        box, size = files.info.view(sample.picture, height, width, view.crop)
        path = files.picture_path(sample.picture, box, size)
        if not path.exists():
            keep(path, encode_picture(pipe, cropped(picture, box, size)))
            made += 1
    return made, list(skipped.values())


def _dtype(name: str, device: torch.device) -> torch.dtype:
    return DTYPES[name] if name != AUTO else torch.float32 if device.type == "cpu" else torch.bfloat16
