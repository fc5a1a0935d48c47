"""How far a run of several stages is: each stage tells its share, and one line says what is left of the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

EVERY = 60  # seconds between two lines, where the output is no terminal
SHOWN = 1  # seconds between two changes of the line in a terminal
KNOWN = 0.02  # share of a stage after which its own speed replaces the planned one

_listener: Callable[[float], None] | None = None


def tell(share: float) -> None:
    """Say how much of the running stage is done, 0 to 1. Outside of a run of several stages, nobody listens."""
    if _listener is not None:
        _listener(share)


def hidden(main: bool = True) -> bool | None:
    """For tqdm's `disable`: True in a run of several stages, which has its own line; None leaves it to tqdm.

    Args:
        main: whether this is the first process; the others show nothing.
    """
    return True if _listener is not None or not main else None


class Stages:
    """The stages of a run, in order, and the time that is left.

    Args:
        seconds: what each stage will take, by its name.
        main: whether this process prints.
    """

    def __init__(self, seconds: dict[str, float], main: bool = True):
        self.seconds, self.main = seconds, main

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A context in which this stage runs."""
        global _listener
        number = list(self.seconds).index(name)
        label = f"[{number + 1}/{len(self.seconds)}] {name}"
        later = sum(list(self.seconds.values())[number + 1 :])
        if self.main:
            print(f"{label}: {duration(self.seconds[name] + later)} left of the whole run", flush=True)
        bar = tqdm(bar_format="{desc}", leave=False, disable=None if self.main else True)
        _listener = _Listener(label, self.seconds[name], later, bar if self.main else None)
        try:
            yield
        finally:
            _listener = None
            bar.close()


class _Listener:
    """Hears the shares of one stage, and shows them.

    Args:
        planned: seconds of this stage.
        later: seconds of those after it.
        bar: the line in a terminal; a disabled one elsewhere; None in a process that shows nothing.
    """

    def __init__(self, label: str, planned: float, later: float, bar: tqdm | None = None):
        self.label, self.planned, self.later, self.bar = label, planned, later, bar
        self.first: tuple[float, float] | None = None  # time and share at which this process began
        self.said = time.monotonic()

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        self.first = self.first or (now, share)
        if self.bar is None or now - self.said < (EVERY if self.bar.disable else SHOWN):
            return
        self.said = now
        text = f"{self.label}: {share:.0%} done, {duration(self.left(now, share) + self.later)} left of the whole run"
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.set_description_str(text)

    def left(self, now: float, share: float) -> float:
        """Seconds left of this stage: by its own speed, once that is known."""
        begun, done_before = self.first or (now, share)
        done = share - done_before
        return (now - begun) / done * (1 - share) if done > KNOWN else self.planned * (1 - share)


def duration(seconds: float) -> str:
    """Seconds as text to read: 40 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"
