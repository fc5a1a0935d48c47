"""Clips as hosts hold them, [T, H, W, C] in 0..1: padding before a causal VAE, cutting after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from ..kvae import padded_frames


def to_clip(x_THWC: Tensor, cadence: int) -> Tensor:
    """Repeat the last frame up to the next cadence·n + 1 frames.

    Raises:
        ValueError: there are no frames.
    """
    if x_THWC.ndim != 4 or len(x_THWC) == 0:
        raise ValueError(f"the clip has shape {list(x_THWC.shape)}; expected [T, H, W, C] with at least one frame")
    missing = padded_frames(len(x_THWC), cadence) - len(x_THWC)
    index = [*range(len(x_THWC)), *[-1] * missing]
    return x_THWC[index] if missing else x_THWC


def kept_frames(decoded: int, original: int | None, cadence: int = 4) -> int:
    """How many of the decoded frames the clip had before padding; all, if it is not known or no longer fits."""
    if original is not None and padded_frames(original, cadence) == decoded:
        return original
    return decoded


def cut_stream(segments: Iterable[Tensor], decoded: int, kept: int) -> Iterator[Tensor]:
    """Segments [T, H, W, C] of clips of `decoded` frames each → the first `kept` frames of each clip."""
    position = 0
    for frames in segments:
        if position < kept:
            yield frames[: kept - position]
        position = (position + len(frames)) % decoded
