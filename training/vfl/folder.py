"""The pictures of a folder that holds a folder for each identity, before they are read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...kvae.paths import file_errors
from ..data.walk import files_under
from ..errors import UserError
from .packed import source_hash
from .pictures import SUFFIXES
from .shards import identity_name


@dataclass(frozen=True, slots=True)
class Found:
    """A picture's file.

    Attributes:
        order: a hash of its path and size, by which files are sorted, so that identities are mixed.
        source: its path in the folder.
    """

    order: int
    source: str

    def identity(self) -> str:
        """The identity of the picture: the first folder in its path.

        Raises:
            ValueError: it lies in no folder, or the folder's name is no name of an identity.
        """
        folder, _, rest = self.source.partition("/")
        if not rest:
            raise ValueError("it lies in no folder of an identity; move it into one")
        return identity_name(folder)


def find_pictures(root: Path) -> list[Found]:
    """The pictures under a folder, in an order that mixes identities and is always the same.

    Raises:
        UserError: the folder is missing, or there are none.
        WeightsError: a folder cannot be read.
    """
    with file_errors(root):
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; --pictures-root must hold a folder of pictures for each identity")
    found = []
    for path in files_under(root):
        source = path.relative_to(root)
        if path.suffix[1:].lower() in SUFFIXES and not any(part.startswith(".") for part in source.parts):
            size = -1
            with suppress(OSError):  # it is named when it is read
                size = path.stat().st_size
            found.append(Found(source_hash(source.as_posix(), size), source.as_posix()))
    if not found:
        raise UserError(
            f"{root}: no pictures in it ({', '.join(SUFFIXES)}); expected a folder of them for each identity"
        )
    return sorted(found, key=lambda each: (each.order, each.source))
