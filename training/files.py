"""Files: written whole or not at all, known by their hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and the folder it goes into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The same with UTF-8."""
    write_bytes(path, text.encode())


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal, as the hub and sha256sum give it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
