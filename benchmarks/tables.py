"""Printing a report line by line as it is measured, and writing it as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def publish(lines: Iterable[str], path: Path | None) -> None:
    """Print every line at once; write all of them to a file too, where one is given."""
    shown = []
    for line in lines:
        print(line, flush=True)
        shown.append(line)
    if path:
        path.write_text("\n".join(shown) + "\n", encoding="utf-8")
