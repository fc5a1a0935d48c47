"""The error that a user can do something about: one line without a traceback."""

from __future__ import annotations

from ..kvae.errors import KVAEError


class UserError(KVAEError):
    """An error whose message says what was found, what was expected and what to do."""


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: file names may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
