"""Strips of rows: how a picture is cut, so that each layer needs memory for one strip at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

MIN_ROWS = 2  # a strip's window reaches one row up and one down, so it never reaches beyond the neighbouring strips


def even_strips(height: int, most: int) -> Iterator[tuple[int, int]]:
    """Bounds (lo, hi) of the fewest strips of nearly equal height, with at most `most` rows each if MIN_ROWS allows."""
    count = _strip_count(height, most)
    bounds = [height * i // count for i in range(count + 1)]
    yield from pairwise(bounds)


def largest_strip(height: int, most: int) -> int:
    """Rows of the tallest strip that `even_strips` makes."""
    return -(-height // _strip_count(height, most))


def _strip_count(height: int, most: int) -> int:
    count = -(-height // max(MIN_ROWS, most))
    return max(1, min(count, height // MIN_ROWS))
