"""The error for files that cannot be used."""


class WeightsError(ValueError):
    """A file cannot be read or written as asked. The message names what was found, what was expected and what to do."""
