"""Results of a bench: printed line by line as they are measured, and written to a file in one piece."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

import torch


def head(title: str, settings: str, device: torch.device | None = None) -> Iterator[str]:
    """First lines of a results file, as Markdown: the command that wrote it, the date, the machine, the settings.

    Args:
        settings: one paragraph: the data, the number of trainings, what is measured on what.
        device: what is measured on, if not the CPU.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    yield f"# {title}"
    yield ""
    yield f"    python -m {module} {shlex.join(sys.argv[1:])}"
    yield ""
    machine = f"{platform.machine()}, threads: {torch.get_num_threads()} of {os.cpu_count()}"
    yield f"{date.today()}; {machine}; PyTorch {torch.__version__}."
    if device and device.type == "cuda":
        yield card(device)
    yield from paragraph(settings)


def paragraph(text: str) -> list[str]:
    """The lines of a paragraph."""
    return textwrap.wrap(text, 120)


def card(device: torch.device) -> str:
    """A GPU's name and memory, and the versions of its driver and libraries."""
    properties = torch.cuda.get_device_properties(device)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.1f} GB; driver {driver}, {toolkit}, "
        f"cuDNN {torch.backends.cudnn.version()}."
    )


def publish(lines: Iterable[str], path: Path | None) -> None:
    """Print each line at once; then write all lines to `path`, if given."""
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    if path:
        path.write_text("\n".join(printed) + "\n", encoding="utf-8")
