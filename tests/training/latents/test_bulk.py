"""Work on many files: one line of progress over all of them, and one line for each that fails."""

import io
import re
import sys
from pathlib import Path

import pytest

from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.latents.bulk import Bulk, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_over_all_files(monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("decode", [30, 10]) as progress:
        for size, total in ((30, 3), (10, 5)):
            report = progress.of_file(size)
            for done in range(total + 1):
                report(done, total)
            shown = sys.stderr.getvalue()
            last = shown.strip().split("\r")[-1]
            assert re.search(r"decode, about 5 s left: +(75|100)%", last)
    assert "\n" not in sys.stderr.getvalue()
    assert "100%" in sys.stderr.getvalue()


def test_a_file_that_fails_is_named_and_the_others_are_done(capsys):
    bulk = Bulk("decoded", 3)
    for name, error in {"a": UserError("a: bad"), "b": ValueError("This latent is\nbad"), "c": KeyError("x")}.items():
        with bulk.file(Path(name)):
            raise error
    lines = ["a: bad", r"b: This latent is\nbad", "c: KeyError: 'x'"]
    assert capsys.readouterr().err.splitlines() == [f"skipped: {line}" for line in lines]
    with pytest.raises(UserError, match="none of the 3 files could be decoded"):
        bulk.finish("out")
