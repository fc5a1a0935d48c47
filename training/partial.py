"""What there is of a download, beside its target, under a name that the next try finds again."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from ..kvae.errors import WeightsError
from ..kvae.paths import check_regular, delete_unlocked, file_errors, is_held, sha256_of
from .errors import UserError

MOST_REWINDS = 1  # a server that gives no parts of files may start anew once; more would never end


class Partial:
    """A file to append to, of one process at a time, that never grows beyond what was announced.

    with Partial(target, tag, size) as partial:
        http_get(url, partial, resume_size=partial.size)
        partial.keep()

    Attributes:
        refusal: why it took no more, if it did not.

    Raises:
        UserError: another process is at it.
        WeightsError: it cannot be written.
    """

    def __init__(self, target: Path, tag: str, most: int):
        self.target, self.most = target, most
        safe = tag if re.fullmatch("[0-9a-f]{12,}", tag) else hashlib.sha256(tag.encode()).hexdigest()
        self.path = target.with_name(f"{target.name}.{safe[:12]}.partial")
        self.name = str(self.path)
        self.refusal: Exception | None = None
        self._rewinds = 0

    def __enter__(self) -> Partial:
        for other in glob.glob(f"{glob.escape(str(self.target))}.*.partial"):
            if other != self.name:  # of what the hub had before
                delete_unlocked(other)
        with file_errors(self.path):
            self._remove_what_is_not_ours()
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
            descriptor = self._file.fileno()
            if is_held(descriptor) or not os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                self._file.close()
                raise UserError(f"{self.target}: another process downloads it; wait for its end")
            if self.size > self.most:
                self._file.truncate(0)
            self._file.seek(0, os.SEEK_END)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, ValueError):
            empty = not self.size
            self._file.close()
            if empty:
                self.path.unlink()
        self._file.close()

    def _remove_what_is_not_ours(self) -> None:
        """A link would be followed, and what it leads to overwritten; a pipe would never be opened."""
        with suppress(FileNotFoundError):
            found = os.lstat(self.path)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                self.path.unlink()

    @property
    def size(self) -> int:
        """Bytes that are there."""
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes) -> int:
        """Append.

        Raises:
            UserError: that would be more than was announced; what there is, is thrown away.
            WeightsError: no room.
        """
        if self._file.tell() + len(data) > self.most:
            self._file.truncate(0)
            self.refusal = UserError(f"{self.target}: the server sends more than the {self.most:,} bytes it announced")
            raise self.refusal
        try:
            with file_errors(self.path):
                self._file.write(data)
                self._file.flush()
        except WeightsError as error:
            self.refusal = error
            raise
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Go back, as is done before starting anew.

        Raises:
            UserError: that was done before.
        """
        self._rewinds += 1
        if self._rewinds > MOST_REWINDS:
            self.refusal = UserError(
                f"{self.target}: the server breaks off, and gives no parts of files, so that nothing can go on"
            )
            raise self.refusal
        return self._file.seek(position, whence)

    def truncate(self) -> int:
        return self._file.truncate()

    def flush(self) -> None:
        self._file.flush()

    def keep(self) -> None:
        """It is whole: put it in its place.

        Raises:
            WeightsError: that cannot be.
        """
        with file_errors(self.target):
            self._file.flush()
            os.fsync(self._file.fileno())
            if os.name == "nt":
                self._file.close()  # Windows replaces no file that is open
            os.replace(self.path, self.target)

    def discard(self) -> None:
        """It is damaged: begin anew the next time."""
        self._file.truncate(0)


def hub_hash(path: Path, tag: str) -> str | None:
    """The hash of a file of the kind that the hub's tag is: sha256 of large files, git's of small ones; else None."""
    if re.fullmatch("[0-9a-f]{64}", tag):
        return sha256_of(path)
    if not re.fullmatch("[0-9a-f]{40}", tag):
        return None
    check_regular(path)
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with file_errors(path), path.open("rb") as file:
        while chunk := file.read(2**20):
            sha1.update(chunk)
    return sha1.hexdigest()
