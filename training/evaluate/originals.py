"""The frames that pairs were made of, found by the pairs' metadata, which is not trusted."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...adapters.spaces import SPACES
from ..data.dataset import Pairs
from ..data.pairs import Pair, Source
from ..data.videos import EXTENSIONS, Clip, read_clip
from ..errors import UserError
from ..options import MOST

LEAST_SIDE = 16  # pixels; SSIM compares windows of 11


def check_originals(pairs: Pairs, chosen: list[int], videos_root: str) -> None:
    """Refuse pairs whose videos are missing, before any work.

    Raises:
        UserError: see `original_frames`.
    """
    for i in chosen:
        _clip(pairs.name(i), pairs[i], videos_root)


def original_frames(name: str, pair: Pair, videos_root: str) -> Tensor:
    """The frames a pair was made of, uint8 [3, T, H, W]. A published pair has no source, so its recipe is assumed.

    Args:
        name: the clip's path in its folder of pairs, without suffix.

    Raises:
        UserError: the video is missing, or the pair's source does not fit its latents.
    """
    clip, source = _clip(name, pair, videos_root)
    frames = read_clip(clip, source.height, source.width, source.fit)
    return frames.flip(-1) if source.mirrored else frames


def _clip(name: str, pair: Pair, videos_root: str) -> tuple[Clip, Source]:
    root = Path(videos_root)
    source = pair.source or _published_source(name, pair, root)
    _check(name, source, pair)
    video = root / source.video
    if not video.is_file():
        raise UserError(f"{video}: no such file; --videos-root must be the folder that the pairs were extracted from")
    count = source.frames if source.first is not None else 4 * (pair.z_h.shape[1] - 1) + 1
    return Clip(video, count, source.first), source


def _check(name: str, source: Source, pair: Pair) -> None:
    """Raise UserError if the source asks for more frames or pixels than the latents stand for.

    `Source` itself refuses files outside the folder of videos.
    """
    _, t, h, w = pair.z_h.shape
    sizes = {(each.spatial_factor * h, each.spatial_factor * w) for each in SPACES.values()}
    frames = max(each.temporal_factor for each in SPACES.values()) * (t - 1) + 1
    fits = (source.height, source.width) in sizes and min(source.height, source.width) >= LEAST_SIDE
    if not (fits and 1 <= source.frames <= frames and 0 <= (source.first or 0) <= MOST):
        raise UserError(
            f"{name}: its source is {source.frames} frames of {source.height}x{source.width} from {source.first} on, "
            f"which do not fit its latents, {t}x{h}x{w}; delete it and extract again"
        )


def _published_source(name: str, pair: Pair, root: Path) -> Source:
    found = next((name + ext for ext in EXTENSIONS if (root / (name + ext)).is_file()), name + EXTENSIONS[0])
    _, t, h, w = pair.z_h.shape
    return Source(found, None, 4 * (t - 1) + 1, 0, 8 * h, 8 * w)
