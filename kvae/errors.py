"""The error that any file can be the reason of."""


class WeightsError(ValueError):
    """A file cannot be read or written as asked. The message names what was found, what was expected and what to do."""
