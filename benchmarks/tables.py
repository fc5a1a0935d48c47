"""Results of a bench: printed line by line as they are measured, and written to a file in one piece."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

import torch


def head(title: str, settings: str) -> Iterator[str]:
    """First lines of a results file, as Markdown: the command that wrote it, the date, the machine, the settings.

    Args:
        settings: one paragraph: the data, the number of trainings, what is measured on what.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec else Path(sys.argv[0]).stem
    yield f"# {title}"
    yield ""
    yield f"    python -m {module} {shlex.join(sys.argv[1:])}"
    yield ""
    machine = f"{platform.machine()}, threads: {torch.get_num_threads()} of {os.cpu_count()}"
    yield f"{date.today()}; {machine}; PyTorch {torch.__version__}."
    yield from textwrap.wrap(settings, 120)


def publish(lines: Iterable[str], path: Path | None) -> None:
    """Print each line at once; then write all lines to `path`, if given."""
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    if path:
        path.write_text("\n".join(printed) + "\n", encoding="utf-8")
