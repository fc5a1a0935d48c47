"""The error a user can do something about: one line, no traceback; and what may stand in such a line."""


class UserError(Exception):
    """Names what was found, what was expected and what to do."""


def printable(text: str) -> str:
    """On one line, without what would command a terminal: names of files may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
