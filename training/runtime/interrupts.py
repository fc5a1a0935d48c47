"""Handle Ctrl-C between steps, never within a step: half a step would leave no valid state to save."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class BetweenSteps:
    """A context in which Ctrl-C is only noted, until `check` raises it. A second Ctrl-C is raised at once.

    with BetweenSteps() as interrupts:
        for batch in batches:
            step(batch)
            interrupts.check()
    """

    def __enter__(self) -> BetweenSteps:
        self.noted = False
        self.main = threading.current_thread() is threading.main_thread()  # no other thread can handle signals
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
        """Raise KeyboardInterrupt if Ctrl-C came since the context began.

        Raises:
            KeyboardInterrupt: Ctrl-C came.
        """
        if self.noted:
            raise KeyboardInterrupt
