"""The errors that this pack raises for what a user can mend."""

from __future__ import annotations

import importlib


class KVAEError(Exception):
    """Base of all errors of the pack. Its classes are shown as kvae.NAME.

    ComfyUI loads the pack as a module named after its folder's path, which it would show before the name.
    """

    _home, __module__ = __name__, "kvae"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._home, cls.__module__ = cls.__module__, "kvae"

    def __reduce__(self) -> tuple:
        return _again, (self._home, type(self).__qualname__, self.args, self.__dict__)


class WeightsError(KVAEError, ValueError):
    """A file cannot be read or written as asked. The message names what was found, what was expected and what to do."""


def _again(home: str, name: str, args: tuple, state: dict) -> BaseException:
    """An unpickled error, of the class with this name in the module `home`."""
    cls = getattr(importlib.import_module(home), name)
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error
