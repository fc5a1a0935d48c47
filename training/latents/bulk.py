"""Work on many files, one after the other: a file that fails is named in one line, and the others are done."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ...kvae.errors import KVAEError
from ...serving.remaining import Remaining, in_words
from ..data.clips import reason_of
from ..errors import UserError, printable
from .made import is_there

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Bulk:
    """The files of a run, and what became of them.

    Args:
        verb: what is done to a file, as "decoded".
        count: how many files there are.
    """

    def __init__(self, verb: str, count: int):
        self.verb, self.count = verb, count
        self.made, self.there, self.failed = set[Path](), set[Path](), set[Path]()
        self.taken: dict[str, Path] = {}

    @contextmanager
    def file(self, path: Path) -> Iterator[None]:
        """A context of work on a file. An error in it is printed in one line, and ends only this file. Warnings that
        are logged meanwhile name the file.

        Raises:
            WeightsError: the disk is full, so that the next file would fail, too.
        """
        warnings = _Warnings(lambda text: self.say(_naming(path, text)))
        logging.getLogger().addHandler(warnings)
        try:
            yield
        except BrokenPipeError:  # nobody reads what is printed
            raise
        except Exception as error:
            if isinstance(error.__context__, OSError) and error.__context__.errno in FULL:
                raise
            self.failed.add(path)
            reason = str(error) if isinstance(error, KVAEError | ValueError | MemoryError) else reason_of(error)
            self.say(f"skipped: {_naming(path, reason)}")
        finally:
            logging.getLogger().removeHandler(warnings)

    def take(self, path: Path, results: Iterable[Path], made: str) -> None:
        """Note what a file is to give, and whether that is there.

        Raises:
            UserError, WeightsError: it would replace the result of another file of this run, or as `is_there`.
        """
        results = list(results)
        for result in results:
            other = self.taken.setdefault(str(result).casefold(), path)
            if other != path:
                raise UserError(f"{path}: {result} is the result of {other} already; use another --output")
        if all([is_there(result, made) for result in results]):
            self.there.add(path)

    def left(self, path: Path) -> bool:
        """Whether the file is still to be worked on."""
        return path not in self.failed and path not in self.there

    def say(self, line: str) -> None:
        """Print a line about a file, beside the progress."""
        tqdm.write(printable(line), file=sys.stderr)

    def code(self) -> int:
        """The exit code: 0, or 1 if some files were skipped.

        Raises:
            UserError: all of them failed.
        """
        if len(self.failed) == self.count:
            raise UserError(f"none of the {self.count} files could be {self.verb}")
        return 1 if self.failed else 0

    def finish(self, output: str) -> int:
        """Print what became of the files; return the exit code.

        Raises:
            UserError: as `code`.
        """
        code = self.code()
        counts = f"{len(self.made)} {self.verb}, {len(self.there)} already there, {len(self.failed)} skipped"
        print(f"{counts} → {output}")
        return code


def _naming(path: Path, text: str) -> str:
    """The text, with the file in front if it does not begin with it."""
    return text if text.startswith(f"{path}:") else f"{path}: {text}"


class _Warnings(logging.Handler):
    """Gives the texts of warnings to a function, instead of printing them across the line of progress."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]


class Progress:
    """One line on a terminal over all files: how much is done, and how long the rest takes.

    Args:
        sizes: the work of each file, in any unit.
    """

    def __init__(self, label: str, sizes: Iterable[int]):
        total = sum(sizes)
        # the estimate that a tqdm makes counts the first segment, which compiles and is measured
        form = "{desc}: {percentage:3.0f}%|{bar}|"
        self.bar = tqdm(total=total, desc=label, bar_format=form, leave=False, disable=None)
        self.label, self.before, self.remaining = label, 0, Remaining()
        self.remaining.after(0, total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def of_file(self, size: int) -> Callable[[int, int], None]:
        """A HostVAE's `on_progress` for the next file."""
        before = self.before
        self.before += size

        def on_progress(done: int, total: int) -> None:
            self.bar.update(before + size * done // total - self.bar.n)
            if done and (seconds := self.remaining.after(before + size * done // total, self.bar.total)) is not None:
                self.bar.set_description_str(f"{self.label}, about {in_words(seconds)} left")

        return on_progress
