"""Remember which files were made of what, so that nothing is made twice.

files = Remembered()
paths = files.of((latent, vae), (fps, codec), make)    # calls make() only if these files are not there yet
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Made:
    made_of: list[weakref.ref]
    settings: tuple
    files: dict[str, tuple[int, int] | None]  # path → what it was like

    def alive(self) -> bool:
        return all(ref() is not None for ref in self.made_of)

    def is_of(self, made_of: Sequence[Any], settings: tuple) -> bool:
        known = [ref() for ref in self.made_of]
        same = len(known) == len(made_of) and all(one is other for one, other in zip(known, made_of, strict=True))
        return same and self.settings == settings

    def unchanged(self) -> bool:
        return all(found is not None and _state(path) == found for path, found in self.files.items())


class Remembered:
    """The files that were made in this process of objects that are still alive. It keeps no object alive."""

    def __init__(self) -> None:
        self._made: list[_Made] = []

    def of(self, made_of: Sequence[Any], settings: tuple, make: Callable[[], list[str]]) -> list[str]:
        """The paths of the files made of the same objects with equal settings, if they are still as they were made.

        Otherwise, `make` makes them anew, and returns their paths.
        """
        self._made = [each for each in self._made if each.alive()]
        for each in self._made:
            if each.is_of(made_of, settings) and each.unchanged():
                return list(each.files)
        paths = make()
        self._made = [each for each in self._made if not each.is_of(made_of, settings)]
        self._made.append(_Made([weakref.ref(each) for each in made_of], settings, {p: _state(p) for p in paths}))
        return paths


def _state(path: str) -> tuple[int, int] | None:
    """Size and time of a file; None if there is none."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    return None
