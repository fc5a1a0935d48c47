"""How far a run is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]  # called with the number of frames done so far; it may raise, to cancel the run


def progress_over_tiles(progress: Progress | None, tiles: int, frames: int) -> Progress:
    """Progress of the streams of the tiles, one after the other, as progress of the clip."""
    before = 0

    def report(done: int) -> None:
        nonlocal before
        if progress:
            progress((before + done) // tiles)
        before += frames if done == frames else 0

    return report
