"""The files of a folder, however deep, through links too, each folder once whatever leads to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...kvae.paths import file_errors


def files_under(root: str | Path) -> Iterator[Path]:
    """All that is not a folder under a folder, in no order of use; what is written while this lasts may be left out.

    Folders are told apart by what they are, not by their names: a link back up does not lead in circles, and one into
    a folder that lies here anyhow does not show its files twice.

    Raises:
        WeightsError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    tops = [str(root)]
    while tops:
        links: list[str] = []
        for top in tops:  # what lies here itself comes before what links lead to, and so keeps its name
            for folder, folders, files in os.walk(top, onerror=_refuse):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                links += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
                yield from (Path(folder, name) for name in files)
        tops = sorted(links)


def _refuse(error: OSError) -> None:
    with file_errors(error.filename or ""):
        raise error
