"""Save a training between its steps: once a minute, and when Ctrl-C came."""

from __future__ import annotations

import time
from collections.abc import Callable

SAVE_SECONDS = 60


class Saves:
    """When a training is saved.

    saves = Saves(lambda: save(training))
    for batch in batches:
        saves.after(step(batch))
    """

    def __init__(self, save: Callable[[], None]):
        self.save, self.last = save, time.monotonic()

    def after(self, interrupted: bool) -> None:
        """Save after a step if a minute has passed since the last time, or if Ctrl-C came.

        Raises:
            KeyboardInterrupt: Ctrl-C came; the state is saved.
        """
        if interrupted or time.monotonic() - self.last > SAVE_SECONDS:
            self.save()
            self.last = time.monotonic()
        if interrupted:
            raise KeyboardInterrupt
