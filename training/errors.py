"""The error a user can do something about: one line, no traceback."""


class UserError(Exception):
    """Names what was found, what was expected and what to do."""
