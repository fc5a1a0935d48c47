"""Clips as hosts hold them, [T, H, W, C] in 0..1: padding before a causal VAE, cutting after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from ..adapters.inspect import check_tensor
from ..kvae import padded_frames


def to_clip(x_THWC: Tensor, cadence: int) -> Tensor:
    """Repeat the last frame up to the next cadence·n + 1 frames.

    Raises:
        ValueError: no clip, or one without frames.
    """
    check_tensor(x_THWC, "pixels")
    if x_THWC.ndim != 4 or len(x_THWC) == 0:
        raise ValueError(f"the clip has shape {list(x_THWC.shape)}; expected [T, H, W, C] with at least one frame")
    missing = padded_frames(len(x_THWC), cadence) - len(x_THWC)
    index = [*range(len(x_THWC)), *[-1] * missing]
    return x_THWC[index] if missing else x_THWC


def kept_frames(decoded: int, original: int | None, cadence: int = 4) -> int:
    """How many of the decoded frames the clip had before padding; all, if it is not known or no longer fits.

    Raises:
        ValueError: `original` is no number of frames.
    """
    check_count(original)
    if original is not None and padded_frames(original, cadence) == decoded:
        return original
    return decoded


def check_count(frames: object) -> None:
    """Refuse what is no number of frames, nor None.

    Raises:
        ValueError: says what it is.
    """
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
        raise ValueError(
            f"kvae_frames of this latent is {repr(frames)[:60]}; expected a number of frames. Check what made it."
        )


def cut_stream(segments: Iterable[Tensor], decoded: int, kept: int) -> Iterator[Tensor]:
    """Segments [T, H, W, C] of clips of `decoded` frames each → the first `kept` frames of each clip."""
    position = 0
    for frames in segments:
        if position < kept:
            yield frames[: kept - position]
        position = (position + len(frames)) % decoded
