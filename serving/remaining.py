"""How long a run still takes, as far as the segments that are done tell."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median_low

RECENT = 5  # segments that the estimate is made from
WORTH_SAYING = 10  # seconds


class Remaining:
    """Seconds that are left, from what is done.

    The first segment does not count: it compiles, loads kernels and is measured. The middle one of the last few does,
    so that a segment that was tried again, since memory ran out, does not count as the pace of all others.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.paces = deque[float](maxlen=RECENT)
        self.done, self.at = 0, 0.0

    def after(self, done: int, total: int) -> float | None:
        """Seconds until `total`; None if nothing can be said yet. `done` is 0 when a run starts."""
        now = self.clock()
        if not done:
            self.paces.clear()
        elif self.done:
            self.paces.append((now - self.at) / max(1, done - self.done))
        self.done, self.at = done, now
        return median_low(self.paces) * (total - done) if self.paces else None


class ProgressText:
    """What to say of a run: nothing if it ends soon, else its progress and the time left, and in the end "done".

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.remaining, self.begun = Remaining(clock), False

    def after(self, done: int, total: int) -> str | None:
        """The text for a run of which `done` of `total` is done; None: nothing new."""
        seconds = self.remaining.after(done, total)
        if not done:
            self.begun = False
        if seconds is None or not (self.begun or seconds >= WORTH_SAYING):
            return None
        self.begun = True
        return "done" if done == total else f"{100 * done // total} %, about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """A duration, as roughly as it is known: "5 s", "40 s", "3 min", "1 h 20 min"."""
    if seconds < 57.5:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    tens = round(minutes / 10)
    return f"{tens // 6} h {10 * (tens % 6)} min" if tens % 6 else f"{tens // 6} h"
