"""The log of a training, `NAME.jsonl`: a line of JSON for each thing that was measured, with the step it was at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..kvae.paths import write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """Its rows; none where there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add_to_log(path: Path, row: dict[str, Any]) -> None:
    """A row more."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rewind_log(path: Path, step: int) -> None:
    """Keep the rows up to a step: what was logged after the state was saved will be logged again."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step))
