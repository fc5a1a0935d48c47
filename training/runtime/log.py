"""The log of a training, `NAME.jsonl`: one JSON object per line, with the step and what was measured there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...kvae.foreign import parse_object
from ...kvae.paths import file_errors, read_bytes, write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; empty if there is no file. Damaged lines, as a full disk leaves them, are left out.

    Raises:
        WeightsError: the file cannot be read.
    """
    if not path.is_file():
        return []
    rows = (_row(line) for line in read_bytes(path).splitlines())
    return [row for row in rows if row]


def add_to_log(path: Path, row: dict[str, Any]) -> None:
    """Append a row.

    Raises:
        WeightsError: the file cannot be written.
    """
    with file_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_rows(path: Path, rows: int) -> None:
    """Keep only the first rows: a resumed training repeats the steps after its saved state, and logs them again."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_log(path)[:rows]))


def _row(line: bytes) -> dict[str, Any]:
    """The numbers of a line, by name; empty if the line is not a row."""
    try:
        row = parse_object(line)
    except ValueError:
        return {}
    fits = "step" in row and all(isinstance(value, int | float) for value in row.values())
    return row if fits else {}
