"""Clips for the small VAEs: stages of training, and random crops of videos held in memory.

# clips are uint8 [3, T, H, W]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...serving.fit import resize
from ..data.videos import Clip, find_videos, read_clip
from ..errors import UserError

FRAMES = 17
SIDE = 128  # of the validation clips, and of the small copies of the training clips
TRAIN_FRAMES = 96  # of each training video, kept in memory in the small size
FULL_FRAMES = 32  # in the full size, which is six times as large
MOST_BATCH_BYTES = 2**30  # of a step's crops as float32; activations need about thirty times as much


@dataclass(frozen=True)
class Stage:
    """A number of steps on batches of crops of 17 frames, `side` x `side` pixels.

    Attributes:
        batch: number of crops.
        part: what is trained, one of a model's parts or "skeleton"; "" for all of it.
    """

    steps: int
    side: int
    batch: int
    part: str = ""


def parse_stages(text: str) -> list[Stage]:
    """The stages of `--stages`.

    Raises:
        UserError: the text is malformed, or a batch would be too large.
    """
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,2})x([1-9][0-9]{0,8})(?::([a-z0-9-]+))?", part.strip())
        if not match or int(match[2]) % 8 or int(match[2]) > SIDE:
            raise UserError(
                f"--stages: {part!r}; expected STEPSxSIDExBATCH or STEPSxSIDExBATCH:PART, a side of 8n up to {SIDE}, "
                "like 600x64x2"
            )
        stages.append(Stage(int(match[1]), int(match[2]), int(match[3]), match[4] or ""))
        size = stages[-1].batch * 3 * FRAMES * stages[-1].side ** 2 * 4
        if size > MOST_BATCH_BYTES:
            raise UserError(
                f"--stages: {part!r}; a batch would be {size / 1e9:,.1f} GB as float32, expected at most "
                f"{MOST_BATCH_BYTES / 1e9:.1f}"
            )
    return stages


class TrainingClips:
    """Training clips in two sizes, and the validation clips, all in memory.

    Args:
        videos_root: UCF101, or part of it; its test split, groups g01 to g07, is for validation.

    Raises:
        UserError: there are no videos or no splits, or a video has fewer than 17 frames.
    """

    def __init__(self, videos_root: str):
        self.small: list[Tensor] = []
        self.full: list[Tensor] = []
        for video in tqdm(find_videos(videos_root, "train"), desc="reading", leave=False, disable=None):
            frames = _long_enough(video, read_clip(Clip(video, TRAIN_FRAMES, 0), 240, 320))
            self.full.append(frames[:, :FULL_FRAMES].clone())
            self.small.append(torch.stack([resize(frame, SIDE, SIDE) for frame in frames.unbind(1)], 1))
        videos = find_videos(videos_root, "test")
        self.validation = [_long_enough(video, read_clip(Clip(video, FRAMES, 0), SIDE, SIDE)) for video in videos]

    def windows(self) -> list[Tensor]:
        """The first two windows of 17 frames of every small training clip."""
        return [clip[:, t : t + FRAMES] for clip in self.small for t in (0, FRAMES) if t + FRAMES <= clip.shape[1]]

    def crops(self, stage: Stage, generator: torch.Generator) -> Tensor:
        """uint8 [B, 3, 17, side, side]: 9 of 10 from the small copies, mirrored and reversed in time at random."""
        return torch.stack([self._crop(stage.side, generator) for _ in range(stage.batch)])

    def _crop(self, side: int, generator: torch.Generator) -> Tensor:
        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        pool = self.small if side == SIDE or draw(10) < 9 else self.full
        video = pool[draw(len(pool))]
        t, y, x = (draw(size - part + 1) for size, part in zip(video.shape[1:], (FRAMES, side, side), strict=True))
        crop = video[:, t : t + FRAMES, y : y + side, x : x + side]
        crop = crop.flip(3) if draw(2) else crop
        return crop.flip(1) if draw(2) else crop


def _long_enough(video: Path, frames: Tensor) -> Tensor:
    if frames.shape[1] < FRAMES:
        raise UserError(f"{video}: {frames.shape[1]} frames; expected at least {FRAMES}: take it out of --videos-root")
    return frames
