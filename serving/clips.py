"""Clips in the layout of hosts, [T, H, W, C] in 0..1: padded before a causal VAE, cut after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..adapters.checks import check_tensor
from ..adapters.spaces import LatentSpace
from ..kvae import padded_frames


def pad_clip(x_THWC: Tensor, temporal_factor: int) -> Tensor:
    """Repeat the last frame up to the next temporal_factor·n + 1 frames.

    Raises:
        ValueError: not a clip [T, H, W, C] of floats, or a clip without frames.
    """
    check_tensor(x_THWC, "pixels")
    if x_THWC.ndim != 4 or len(x_THWC) == 0:
        raise ValueError(f"the clip has shape {list(x_THWC.shape)}; expected [T, H, W, C] with at least one frame")
    missing = padded_frames(len(x_THWC), temporal_factor) - len(x_THWC)
    return torch.cat([x_THWC, x_THWC[-1:].expand(missing, -1, -1, -1)]) if missing else x_THWC


def check_replaceable(z_shape: Sequence[int], x_shape: Sequence[int], space: LatentSpace, side: int) -> None:
    """Raise unless latents of shape [B, c, t, h, w] are of one clip as long and as large as the clip [T, H, W, C].

    Args:
        side: the multiple of pixels that the clip's sides are cropped to before it is encoded.

    Raises:
        ValueError: says what the latents decode to.
    """
    T, H, W = x_shape[0], *(n // side * side for n in x_shape[1:3])
    encoded = 1, *space.latent_shape(T, H, W)
    if tuple(z_shape) != encoded:
        clips, _, frames, height, width = space.decoded_shape(z_shape)
        raise ValueError(
            f"This clip gives a latent {list(encoded)}; samples is {list(z_shape)}, {clips} x {frames} frames of "
            f"{width} x {height}. Make one as long and as large as the other, in one clip."
        )


def frames_to_keep(decoded: int, original: int | None, temporal_factor: int = 4) -> int:
    """The number of decoded frames that the clip had before it was padded.

    Args:
        decoded: frames of the decoded clip.
        original: frames of the clip before it was padded and encoded, if known. All decoded frames are kept if it is
            not known, or does not fit: the latent was cut or extended since.

    Raises:
        ValueError: `original` is not a positive whole number.
    """
    check_frame_count(original)
    if original is not None and padded_frames(original, temporal_factor) == decoded:
        return original
    return decoded


def check_frame_count(frames: object) -> None:
    """Raise unless `frames` is a positive whole number, or None.

    Raises:
        ValueError: says what was found.
    """
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
        raise ValueError(
            f"kvae_frames of this latent is {repr(frames)[:60]}; expected a number of frames. Check what made it."
        )


def cut_clip(segments: Iterator[Tensor], decoded: int, kept: int) -> Iterator[Tensor]:
    """The next clip of `decoded` frames, in segments [T, H, W, C] → its first `kept` frames. The rest is read, too."""
    position = 0
    while position < decoded:
        frames = next(segments)
        if position < kept:
            yield frames[: kept - position]
        position += len(frames)
