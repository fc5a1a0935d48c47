"""Time and memory on a GPU, beside diffusers: prints the report, and writes docs/performance-gpu.md.

    python -m benchmarks.gpu                        # all sections, at most five minutes on an H100 or H200
    python -m benchmarks.gpu --only peaks ladder    # some of them; the file stays as it is
    python -m benchmarks.gpu --tiny                 # all, with small models on the CPU: whether the bench itself works

It needs a card, diffusers and this checkout; training and extraction also need requirements-training.txt. With
COMFYUI_PATH, the folder of a ComfyUI, its VAE Decode is measured too, in about two minutes more (run this with a Python
that has ComfyUI's requirements). A section that has used up its share of the time leaves out the rest. What does not
fit the card's memory is reported, and the report goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module

import torch

from kvae_comfyui.benchmarks.gpu.measure import free
from kvae_comfyui.benchmarks.gpu.setup import Setup, card_setup, tiny_setup
from kvae_comfyui.benchmarks.peak import ROOT
from kvae_comfyui.benchmarks.tables import head, publish

PAGE = ROOT / "docs" / "performance-gpu.md"
SECTIONS = {
    "convolutions": ("convolutions", "section"),
    "1.0": ("coders", "section_1"),
    "2.0": ("coders", "section_2"),
    "peaks": ("peaks", "section"),
    "ladder": ("ladder", "section"),
    "comfyui": ("comfyui", "section"),
    "training": ("training", "section"),
    "extraction": ("extraction", "section"),
    "goals": ("goals", "section"),
}


def main() -> None:
    """Print the report. It is written to the page if it is whole and from a card."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="print these sections only")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("python -m benchmarks.gpu: PyTorch finds no GPU here; --tiny runs small models on the CPU")
    setup = tiny_setup() if options.tiny else card_setup()
    whole = not options.tiny and options.only == list(SECTIONS)
    publish(report(setup, options.only), PAGE if whole else None)


def report(setup: Setup, only: list[str]) -> Iterator[str]:
    """The page, line by line."""
    start = time.perf_counter()
    settings = "Small models: no figure counts." if setup.tiny else "Random weights from one seed. GB are 10⁹ bytes."
    yield from head("Speed and memory on a GPU", settings, setup.device)
    for name in only:
        yield from section(setup, name)
    yield ""
    yield f"Measured in {time.perf_counter() - start:.0f} seconds."


def section(setup: Setup, name: str) -> Iterator[str]:
    """A section after an empty line. If it fails, the line says why, and the next section can still be measured."""
    module, function = SECTIONS[name]
    try:
        lines = getattr(import_module(f"kvae_comfyui.benchmarks.gpu.{module}"), function)(setup)
        for n, line in enumerate(lines):
            if not n:
                yield ""
            yield line
    except ModuleNotFoundError as error:
        yield from ["", f"{name}: not measured, since it needs {error.name} (requirements-training.txt)."]
    except Exception as error:
        traceback.print_exc()
        yield from ["", f"{name}: not measured, {type(error).__name__}: {' '.join(str(error).split())}"]
    free(setup.device)


if __name__ == "__main__":
    main()
