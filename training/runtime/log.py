"""The log of a training, `NAME.jsonl`: a line of JSON for each thing that was measured, with the step it was at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...kvae.foreign import parse_object
from ...kvae.paths import file_errors, read_bytes, write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """Its rows; none where there is no such file. Lines that are none, as a full disk leaves, are left out."""
    if not path.is_file():
        return []
    rows = (_row(line) for line in read_bytes(path).splitlines())
    return [row for row in rows if row]


def add_to_log(path: Path, row: dict[str, Any]) -> None:
    """A row more."""
    with file_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_rows(path: Path, rows: int) -> None:
    """Keep the first rows: what was logged after the state was saved will be logged again."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_log(path)[:rows]))


def _row(line: bytes) -> dict[str, Any]:
    """Names and numbers; nothing where the line is another thing."""
    try:
        row = parse_object(line)
    except ValueError:
        return {}
    fits = "step" in row and all(isinstance(value, int | float) for value in row.values())
    return row if fits else {}
