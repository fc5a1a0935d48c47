"""The samples of WebDataset's tars, read with limits: a tar may come from others.

A sample is the files whose names agree up to the first dot of the last part: `<id>.jpg` and `<id>.json`. They lie next
to each other. What else belongs to a sample is passed over.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from ...kvae.foreign import parse_object
from ...kvae.paths import check_regular, file_errors
from ..errors import UserError
from .pictures import MOST_BYTES, SUFFIXES

MOST_JSON_BYTES = 1 << 20
MOST_HEADER_BYTES = 1 << 20  # of one read of a header; names and times need a few hundred
CHUNK = 1 << 20
META = re.compile(r"__[^/]*__($|/)")  # webdataset passes these over
END = bytes(tarfile.BLOCKSIZE)  # after the last file


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        key, suffix: of its name.
        header, offset: where its header and its data begin, in bytes.
        size: of the data.
        read: gives the data, until the next member is asked for.
    """

    key: str
    suffix: str
    header: int
    offset: int
    size: int
    read: Callable[[], bytes] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Entry:
    """A sample in a tar: where its picture is, and what its JSON says.

    Attributes:
        data: the picture's file; empty if it was not asked for.
    """

    id: str
    header: int
    offset: int
    size: int
    about: dict[str, Any]
    data: bytes = b""


def entries(path: Path) -> Iterator[Entry]:
    """Yield the samples of a tar on a disk, without their pictures.

    Raises:
        UserError: the tar is damaged or cut short, or a sample is incomplete.
        WeightsError: the file cannot be read.
    """
    check_regular(path)
    with file_errors(path), path.open("rb") as file, tar_errors(str(path)):
        yield from samples(file, with_pictures=False)


def samples(file: BinaryIO, with_pictures: bool) -> Iterator[Entry]:
    """Yield the samples of a tar, which need not be able to seek.

    Raises:
        tarfile.TarError: it is damaged or cut short.
        ValueError: a sample is incomplete, or a file in it is too large.
    """
    for key, group in groupby(members(file), key=lambda member: member.key):
        about: dict[str, Any] | None = None
        pictures: list[tuple[Member, bytes]] = []
        for member in group:
            if member.suffix == "json":
                about = _about(key, member.read())
            else:
                pictures.append((member, member.read() if with_pictures else b""))
        if len(pictures) != 1:
            raise ValueError(f"the sample {key!r} has {len(pictures)} pictures; expected one ({', '.join(SUFFIXES)})")
        if about is None:
            raise ValueError(f"the sample {key!r} has no {key}.json next to its picture")
        picture, data = pictures[0]
        yield Entry(key, picture.header, picture.offset, picture.size, about, data)


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the pictures and JSONs of a tar, which need not be able to seek.

    Raises:
        tarfile.TarError: it is damaged or cut short.
        ValueError: a file in it is too large.
    """
    source = _Forward(file)
    tar = tarfile.TarFile(fileobj=source)  # type: ignore[arg-type]
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or all would be kept
        key, suffix = split_name(info.name)
        if not info.isreg() or suffix not in (*SUFFIXES, "json") or META.match(info.name):
            continue
        if info.issparse():
            raise ValueError(f"{info.name} is stored with holes; pack it with another program")
        most = MOST_JSON_BYTES if suffix == "json" else MOST_BYTES
        if info.size > most:
            raise ValueError(f"{info.name} has {info.size:,} bytes; expected {most:,} at most")
        yield Member(key, suffix, info.offset, info.offset_data, info.size, _reading(source, info))
    if source.last != END:  # Python's tarfile takes a damaged header for the end
        raise tarfile.ReadError("no end, or a damaged header")


def split_name(name: str) -> tuple[str, str]:
    """A name's key and suffix, in lower case, as webdataset splits it; two empty texts for a name without a dot."""
    match = re.match(r"((?:.*/)?[^./]+)\.([^/]*)$", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else ("", "")


@contextmanager
def tar_errors(name: str) -> Iterator[None]:
    """A context in which errors about a tar become errors of one line.

    Raises:
        UserError: a TarError or a ValueError was raised.
    """
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"{name}: damaged, cut short, or not a tar ({error}); make it again") from None
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _about(key: str, data: bytes) -> dict[str, Any]:
    """The JSON of a sample.

    Raises:
        ValueError: it is not an object.
    """
    try:
        return parse_object(data)
    except ValueError as error:
        raise ValueError(f"{key}.json: {error}") from None


def _reading(source: _Forward, info: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        source.seek(info.offset_data)
        data = source.read(info.size, MOST_BYTES)
        if len(data) < info.size:
            raise tarfile.ReadError(f"it ends within {info.name}")
        return data

    return read


class _Forward:
    """A file or a pipe as tarfile wants it, which only goes forward, and reads no more at once than is sensible.

    A header can name any size, or a place before itself.

    Attributes:
        last: what was read last.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.place, self.last = file, 0, b""
        self.seekable = file.seekable() if hasattr(file, "seekable") else False

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> None:
        if place < self.place:
            raise tarfile.ReadError("a header leads backwards")
        if self.seekable:
            self.file.seek(place)
            self.place = place
        while self.place < place and self.read(min(CHUNK, place - self.place)):
            pass

    def read(self, size: int, most: int = MOST_HEADER_BYTES) -> bytes:
        if not 0 <= size <= most:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        parts = []
        while size and (part := self.file.read(size)):  # a pipe gives what it has
            parts.append(part)
            size -= len(part)
        self.last = b"".join(parts)
        self.place += len(self.last)
        return self.last
