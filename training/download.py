"""Download a file over HTTP in pieces that the next run can continue.

huggingface_hub's hf_hub_download does not always continue: versions 1.33 and 2.4 restart an interrupted download from
zero, 1.12 did not (https://github.com/huggingface/huggingface_hub/issues/4196). None of them compares the hash.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

from ..kvae import WeightsError
from ..kvae.hub import hub_client, hub_reason
from ..kvae.paths import delete_unlocked, file_errors, is_held
from .errors import UserError

CHUNK_BYTES = 2**18  # the most that is lost when a connection breaks
MAX_FAILURES = 3  # attempts in a row that bring no new byte


@contextmanager
def open_partial(target: Path, etag: str, size: int) -> Iterator[BufferedRandom]:
    """Open the partial file of earlier runs at its end, locked against other processes.

    The file stays next to `target` for the next run, unless it is empty or `keep` has renamed it. Its name contains
    the hub's tag, so that two versions of a file never mix.

    Args:
        etag: the hub's tag of the file.
        size: of the complete file, in bytes; a longer partial file is emptied.

    Raises:
        UserError: another process downloads to the same target.
        WeightsError: the file cannot be written.
    """
    safe = etag if re.fullmatch("[0-9a-f]{12,}", etag) else hashlib.sha256(etag.encode()).hexdigest()
    path = target.with_name(f"{target.name}.{safe[:12]}.partial")
    for other in glob.glob(f"{glob.escape(str(target))}.*.partial"):
        if other != str(path):  # belongs to an earlier version on the hub
            delete_unlocked(other)
    with file_errors(path):
        _delete_unless_plain(path)
        file = open(path, "r+b", opener=_create)  # noqa: SIM115 (closed below)
        held = is_held(file.fileno()) or not os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    if held:
        file.close()
        raise UserError(f"{target}: another process is downloading it; wait until that process ends")
    try:
        if file.seek(0, os.SEEK_END) > size:
            file.seek(0)
            file.truncate()
        yield file
    finally:
        with suppress(OSError):  # what a full disk did not accept
            file.close()
        with suppress(OSError):  # `keep` has renamed it
            if not path.stat().st_size:
                path.unlink()


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _delete_unless_plain(path: Path) -> None:
    """Delete a link, which writing would follow, or a pipe, on which opening would wait."""
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            path.unlink()


def download_rest(url: str, file: BufferedRandom, size: int, name: str, token: bool = True) -> None:
    """Append the bytes that are still missing, with a progress bar; reconnect as long as that brings new bytes.

    Args:
        size: of the complete file, in bytes.
        name: what the progress bar shows.
        token: whether to send the hub's token, if there is one.

    Raises:
        UserError: the connection fails repeatedly without a new byte, or the server sends more than `size` bytes.
        WeightsError: the file cannot be written.
    """
    furthest, failures = file.tell(), 0
    with hub_client().utils.tqdm(
        total=size, initial=furthest, unit="B", unit_scale=True, desc=name, disable=None
    ) as bar:
        while file.tell() < size:
            try:
                _append(url, file, size, bar, token)
                reason = "the connection ended early"
            except (UserError, WeightsError):
                raise
            except Exception as error:  # which HTTP library raises it depends on huggingface_hub's version
                reason = hub_reason(error)
            failures = 0 if file.tell() > furthest else failures + 1
            furthest = max(furthest, file.tell())
            if failures == MAX_FAILURES:
                raise UserError(f"{url}: {reason}; run the same command again to continue")
            if furthest < size:
                time.sleep(1)


def _append(url: str, file: BufferedRandom, size: int, bar: Any, token: bool) -> None:
    """One request for the missing bytes."""
    with _get(url, file.tell(), token) as (start, chunks):
        bar.update(start - file.tell())
        file.seek(start)
        file.truncate()
        for chunk in chunks:
            if file.tell() + len(chunk) > size:
                file.truncate(0)
                raise UserError(f"{url}: the server sends more than the {size:,} bytes it announced")
            with file_errors(file.name):
                file.write(chunk)
                file.flush()
            bar.update(len(chunk))


@contextmanager
def _get(url: str, start: int, token: bool) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Request a file from byte `start` on.

    Yields:
        the position where the response starts, which is 0 if the server ignores ranges; and its chunks.
    """
    hub = hub_client()
    sent = hub.utils.build_hf_headers(token=None if token else False)
    headers = {**sent, "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    session, timeout = hub.get_session(), hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):  # httpx, from huggingface_hub 1.0 on
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            response.raise_for_status()
            yield start if response.status_code == 206 else 0, response.iter_bytes(CHUNK_BYTES)
    else:  # requests
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            response.raise_for_status()
            yield start if response.status_code == 206 else 0, response.iter_content(CHUNK_BYTES)


def hash_of(file: BufferedRandom, etag: str) -> str | None:
    """The hash to compare with the hub's tag: sha256 for large files, git's sha1 for others; None for other tags."""
    size = file.seek(0, os.SEEK_END)
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        return None
    file.seek(0)
    with file_errors(file.name):
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def keep(file: BufferedRandom, target: Path) -> None:
    """Give a complete download its final name, while it is still locked.

    Raises:
        WeightsError: it cannot be renamed.
    """
    with file_errors(target):
        os.fsync(file.fileno())
        if os.name == "nt":
            file.close()  # Windows renames no open file
        os.replace(file.name, target)
