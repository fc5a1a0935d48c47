"""Decoding with little memory: HostVAE beside HunyuanVideo's VAE in diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from kvae_comfyui.benchmarks.gpu.limited import TILES, WAYS, Decode
from kvae_comfyui.benchmarks.gpu.measure import FAILED, NO_TIME, free
from kvae_comfyui.benchmarks.gpu.setup import Setup, shape_text
from kvae_comfyui.benchmarks.peak import ROOT
from kvae_comfyui.benchmarks.tables import paragraph

EXACT_DOWN_TO, LARGE = 12, 24  # GB, as in the goals


def section(setup: Setup) -> Iterator[str]:
    """A row for each limit."""
    free(setup.device)
    yield f"## Little memory: decoding {shape_text(setup.ladder_size)} with KVAE-3D-1.0"
    yield ""
    yield from paragraph(
        "Seconds until the frames are in the CPU's memory, by GB for the process, weights included. *told*: another "
        "process holds the rest of the card, and HostVAE is told how much is free. *not told*: the allocator gets no "
        "more, and HostVAE starts with its fastest plan. *HunyuanVideo*: `AutoencoderKLHunyuanVideo` of diffusers, "
        "limited like that, and in tiles as in ComfyUI if it runs out of memory. After a time: what was tried after "
        "the first try; the last of them decoded the clip."
    )
    yield ""
    yield "| GB | told | exact | not told | exact | HunyuanVideo |"
    yield "|---|---|---|---|---|---|"
    found = {(decode.free, decode.way): decode for decode in decodes(setup)}
    for gigabytes in setup.free:
        told, not_told, stock = (found.get((gigabytes, way)) for way in WAYS)
        cells = [shown(told), exact(told), shown(not_told), exact(not_told), shown(stock)]
        yield f"| {gigabytes_text(gigabytes)} | {' | '.join(cells)} |"
    note(setup, found)


def decodes(setup: Setup) -> Iterator[Decode]:
    """Those of the process that decodes under limits, as far as it gets in the section's time."""
    command = [sys.executable, "-m", "benchmarks.gpu.limited", *(["tiny"] if setup.tiny else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=setup.shares["ladder"])
        lines = done.stdout
    except subprocess.TimeoutExpired as error:
        lines = error.stdout or b""
    whole_lines = lines.decode().split("\n")[:-1]
    return (Decode(**json.loads(line)) for line in whole_lines if line.startswith("{"))


def note(setup: Setup, found: dict[tuple[float | None, str], Decode], where: str = "ladder") -> None:
    """Keep what the goals ask for."""
    whole, figures = found.get((None, "told")), setup.figures
    for (gigabytes, way), decode in found.items():
        stock = found.get((gigabytes, "HunyuanVideo"))
        if way == "HunyuanVideo" or gigabytes is None:
            continue
        figures[f"{where} fails"].append(decode.seconds is None or TILES in decode.tried)
        if gigabytes >= EXACT_DOWN_TO:
            figures[f"{where} exact"].append(decode.is_exact)
        if decode.seconds and stock and stock.seconds:
            figures[f"{where}, of HunyuanVideo"].append(decode.seconds / stock.seconds)
        if decode.seconds and gigabytes == LARGE and whole and whole.seconds:
            figures[f"{where}, of the whole card"].append(decode.seconds / whole.seconds)


def gigabytes_text(gigabytes: float | None) -> str:
    """A limit, for the first column."""
    return "all" if gigabytes is None else f"{gigabytes:.0f}"


def shown(decode: Decode | None) -> str:
    """Seconds, and what was tried."""
    if decode is None:
        return NO_TIME
    seconds = FAILED if decode.seconds is None else f"{decode.seconds:.2f}"
    return "; ".join([seconds, *decode.tried])


def exact(decode: Decode | None) -> str:
    """Whether the result is that of the whole clip."""
    if decode is None or decode.seconds is None:
        return "–"
    return "yes" if decode.is_exact else "no"
