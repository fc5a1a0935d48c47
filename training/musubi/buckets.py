"""Buckets of musubi-tuner: the sizes that media are resized to, so that those of one size make a batch.

A size is (width, height) in pixels. Rules are those of musubi-tuner 0.3.4 (dataset/bucket.py), with a step of 16, as
for all models that are cached here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .config import Dataset

Size = tuple[int, int]
STEP = 16


def buckets_of(resolution: Size) -> list[Size]:
    """All buckets for the area of a resolution, smallest width first. The area must be that of 32x32 at least."""
    area = resolution[0] * resolution[1]
    root = math.isqrt(area)
    sizes: set[Size] = set()
    for width in range(_floored(root // 2), root + STEP, STEP):
        height = _floored(area // width)
        sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def bucket_chooser(dataset: Dataset) -> Callable[[Size], Size]:
    """The function that gives the bucket of a picture of a size.

    Up to 0.3.4 musubi-tuner caches videos in buckets whatever enable_bucket and bucket_no_upscale say, but groups the
    caches for training by both. Here both count, as in later versions.
    """
    resolution = dataset.resolution
    if not dataset.enable_bucket:
        return lambda size: resolution
    buckets = buckets_of(resolution)

    def choose(size: Size) -> Size:
        width, height = size
        if dataset.bucket_no_upscale and width * height <= resolution[0] * resolution[1]:
            return _floored(width), _floored(height)
        return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))

    return choose


def _floored(side: int) -> int:
    return side - side % STEP
