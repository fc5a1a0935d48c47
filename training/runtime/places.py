"""Paths that users give to commands: whether they can be written, and how files that people share name them."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import Any

from ...kvae.errors import WeightsError
from ...kvae.paths import PARTIAL_PREFIX, PARTIAL_SUFFIX, file_errors, is_held
from ..errors import UserError


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be written to. The check makes the folder and a file in it, and removes both.

    Raises:
        UserError: names the option, the path and the reason.
    """
    if _another_rank():
        return
    with _named(option), file_errors(folder), _made(folder):
        _try(folder / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def check_target(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, because of its folder, its name, or something else that has its name.

    Raises:
        UserError: as `check_folder`.
    """
    if _another_rank():
        return
    with _named(option), file_errors(path):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            with _made(path.parent):
                _try(path)
            return
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise UserError(f"{path}: this is {kind}; expected the name of a file")
    check_folder(option, path.parent)


def check_apart(outputs: Mapping[str, Path], inputs: Iterable[Path] = ()) -> None:
    """Refuse outputs that would overwrite each other or an input, also through links and other spellings.

    Args:
        outputs: by their names in the message.

    Raises:
        UserError: names both.
    """
    taken: dict[str, str] = {os.path.realpath(path): str(path) for path in inputs}
    for name, path in outputs.items():
        place = os.path.realpath(path)
        if place in taken:
            raise UserError(f"{name} is {path}, which is {taken[place]} too; one would overwrite the other")
        taken[place] = name


def shareable(config: Any) -> dict[str, Any]:
    """The settings of a command, for files that people share. Absolute paths and paths that lead upwards, which tell
    about this machine, are reduced to their last part."""
    return {key: _shareable(value) if isinstance(value, str) else value for key, value in asdict(config).items()}


def _shareable(text: str) -> str:
    windows = PureWindowsPath(text)
    telling = os.path.isabs(text) or windows.drive or windows.root or ".." in windows.parts or text.startswith("~")
    return windows.name if telling else text


def _another_rank() -> bool:
    """Whether this is not the first process of the machine. Only the first tries to write: another process could find
    the folder that the first is about to remove."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def _named(option: str) -> Iterator[None]:
    try:
        yield
    except (UserError, WeightsError) as error:
        advice = "" if ";" in str(error) else "; choose another place"
        raise UserError(f"{option} {error}{advice}") from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it at the end of the context."""
    made: list[Path] = []
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.is_dir():
                if os.path.lexists(each):
                    raise UserError(f"{each}: this is not a folder; choose another place")
                each.mkdir()
                made.append(each)
        yield
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


def _try(path: Path) -> None:
    """Create a new file, and delete it."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    path.unlink()


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Lock a folder for this run of a command that numbers its files. A new folder is removed if it stays empty.

    Raises:
        UserError: another run is writing there.
        WeightsError: the folder cannot be made.
    """
    with file_errors(folder):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY) if os.name != "nt" else None  # Windows cannot open a folder
    try:
        if descriptor is not None and is_held(descriptor):
            raise UserError(f"{folder}: another {command} is writing there; wait until it has finished")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if new:
            with suppress(OSError):
                folder.rmdir()
