"""Random numbers that depend on a key alone: equal on every machine, in every process, and after a resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np

# of the numbers that numpy makes, only the raw bits are promised to stay the same in its later versions


class Draws:
    """A sequence of random numbers.

    Args:
        key: whole numbers and texts that name the sequence: a seed, a purpose, the number of a sample.
    """

    def __init__(self, *key: int | str):
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def bits(self) -> int:
        """A whole number in 0 .. 2⁶⁴ − 1."""
        return int(self._bits.random_raw())

    def below(self, n: int) -> int:
        """A whole number in 0 .. n − 1, each as likely to within n / 2⁶⁴."""
        return self.bits() * n >> 64

    def unit(self) -> float:
        """A number in [0, 1), a multiple of 2⁻⁵³."""
        return (self.bits() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        return low + (high - low) * self.unit()

    def shuffled(self, n: int) -> Iterator[int]:
        """Yield 0 .. n − 1 in random order. The first few of many cost no more than the first few of few."""
        moved: dict[int, int] = {}  # the places of a list 0 .. n − 1 that no longer hold their own number
        for i in range(n):
            j = i + self.below(n - i)
            yield moved.pop(j, j)
            if j != i:
                moved[j] = moved.pop(i, i)
