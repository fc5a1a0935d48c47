"""Find all files under a folder. Links are followed, and each folder is visited once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...kvae.paths import file_errors


def files_under(root: str | Path) -> Iterator[Path]:
    """Yield everything under a folder that is not a folder, in no particular order.

    Folders are identified by device and inode. So a link back up does not lead in circles, and a link into a folder of
    the same tree does not yield its files twice. Files that are written meanwhile may be missing.

    Raises:
        WeightsError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    tops = [str(root)]
    while tops:
        links: list[str] = []
        for top in tops:  # folders come before links to them, so files keep the names without links
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
