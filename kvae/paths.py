"""Read regular files only, and write files completely or not at all.

with written_whole("result.mp4") as partial:    # a hidden file in the same folder
    make(partial)                                # a failure or a kill in here leaves result.mp4 as it was
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nobody can delete a file that is open
    fcntl = None  # type: ignore[assignment]

from .errors import WeightsError

PARTIAL_PREFIX, PARTIAL_SUFFIX = ".kvae-", ".partial"
CLOSED_SECONDS = 60  # Windows has no lock: for this long, a closed file may be about to be renamed by its writer
MAX_TEXT_BYTES = 64 << 20  # of JSON and other text; an index of ten million pairs in shards needs a tenth of that

_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "this disk does not support files of that size",
    errno.EACCES: "choose a place that you may use",
    errno.EPERM: "choose a place that you may use",
    errno.EROFS: "choose a place that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of it is a file; choose a folder",
    errno.EISDIR: "this is a folder; choose a file",
    errno.EEXIST: "something else has that name; choose another",
    errno.ELOOP: "a link leads back to itself",
}


def reason(error: OSError | ValueError) -> str:
    """Why a path cannot be used, in a few words: the system's message, and what to do."""
    if not isinstance(error, OSError):
        return "not a name that a file can have"  # a NUL, or a letter that the file system's encoding lacks
    text = error.strerror or str(error) or type(error).__name__
    hint = _HINTS.get(error.errno or 0)
    return f"{text}; {hint}" if hint else text


@contextmanager
def file_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn the system's errors about a path into errors of one line.

    Raises:
        WeightsError: an OSError was raised, or the path is not valid.
    """
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError("a NUL")
    except ValueError as error:
        raise WeightsError(f"{str(path)!r}: {reason(error)}") from None
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str | os.PathLike) else path
        hidden = Path(named).name.startswith(PARTIAL_PREFIX)  # a generated name would tell the user nothing
        raise WeightsError(f"{path if hidden else named}: {reason(error)}") from None


def check_regular(path: str | os.PathLike) -> None:
    """Refuse everything but a regular file: opening a named pipe waits for ever, and a device may have no end.

    Raises:
        WeightsError: the path does not exist, or is a folder, a pipe, a socket or a device.
    """
    with file_errors(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            raise WeightsError(f"{path}: no such file") from None
    if stat.S_ISDIR(mode):
        raise WeightsError(f"{path}: this is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise WeightsError(f"{path}: this is a pipe, a socket or a device; expected a file")


def read_bytes(path: str | os.PathLike, most: int = MAX_TEXT_BYTES) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        WeightsError: the file is larger, not a regular file, or cannot be read.
    """
    check_regular(path)
    with file_errors(path), open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise WeightsError(f"{path}: more than {most >> 20} MiB; no such file is that large")
    return data


def read_text(path: str | os.PathLike, most: int = MAX_TEXT_BYTES) -> str:
    """Read a file of at most `most` bytes as UTF-8 text.

    Raises:
        WeightsError: as `read_bytes`; or the text is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty file to write into. At the end it replaces `path`; after a failure it is deleted.

    The caller writes into the file and must not replace it. Missing folders are made. The file has a unique name, so
    that several writers of one path do not interfere. It is locked while its writer lives: if the writer is killed, the
    next process that writes into the folder deletes the file.

    Raises:
        WeightsError: the disk is full, or the path cannot be written.
    """
    path = Path(path)
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_regular(path)  # a file must not replace a device
        _sweep(path.parent)
        partial, descriptor = _new_partial(path.parent)
    try:
        with file_errors(path):
            try:
                yield partial
                os.fsync(descriptor)
                if fcntl is not None:
                    os.replace(partial, path)  # while it is locked: unlocked, another process would delete it
            finally:
                os.close(descriptor)
            if fcntl is None:
                os.replace(partial, path)  # Windows cannot rename an open file
    finally:
        with suppress(OSError):
            partial.unlink()


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file completely or not at all, and make its folder.

    Raises:
        WeightsError: as `written_whole`.
    """
    with written_whole(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text completely or not at all. Lone surrogates, as in file names of other encodings, are escaped.

    Raises:
        WeightsError: as `written_whole`.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 hash of a file in hexadecimal, as the hub and sha256sum print it.

    Raises:
        WeightsError: the path is not a regular file, or cannot be read.
    """
    check_regular(path)
    with file_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new_partial(folder: Path) -> tuple[Path, int]:
    """Make a new file in the folder, open and locked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        partial = folder / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
        descriptor = os.open(partial, flags, 0o666)
        _lock(descriptor)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(partial), os.fstat(descriptor)):
                return partial, descriptor
        os.close(descriptor)  # swept by another process before it was locked


def _lock(descriptor: int) -> bool:
    """Lock an open file; whether that worked. Always False on a file system without locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@cache
def _sweep(folder: Path) -> None:
    """Delete the files of killed writers in a folder; once per process, as a folder may hold millions of files."""
    with suppress(OSError), os.scandir(folder) as entries:
        left = [e for e in entries if e.name.startswith(PARTIAL_PREFIX) and e.name.endswith(PARTIAL_SUFFIX)]
        for entry in left:
            if fcntl is not None or time.time() - entry.stat().st_mtime > CLOSED_SECONDS:
                delete_unlocked(entry.path)


def is_held(descriptor: int) -> bool:
    """Lock a file for as long as it is open. True if another process holds the lock; False without file locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def delete_unlocked(path: str) -> None:
    """Delete a file that no process has locked; ignore failures."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError):
        descriptor = os.open(path, flags)
        try:
            if fcntl is not None and _lock(descriptor):
                os.unlink(path)
        finally:
            os.close(descriptor)
        if fcntl is None:
            os.unlink(path)  # Windows refuses this while the writer lives
