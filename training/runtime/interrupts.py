"""Ctrl-C between steps, never within one: a state saved after half a step would not be a state of the run."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class BetweenSteps:
    """While this lasts, Ctrl-C is noted, and `check` raises it where the loop allows. A second Ctrl-C does not wait.

    with BetweenSteps() as interrupts:
        for batch in batches:
            step(batch)
            interrupts.check()
    """

    def __enter__(self) -> BetweenSteps:
        self.noted = False
        self.main = threading.current_thread() is threading.main_thread()  # only there can signals be handled
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def check(self) -> None:
        """Raise the Ctrl-C that came since.

        Raises:
            KeyboardInterrupt: one came.
        """
        if self.noted:
            raise KeyboardInterrupt
