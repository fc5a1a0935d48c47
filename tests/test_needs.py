"""Every skipped test says what would run it: `pytest -ra` then lists what was not run, and how to run it."""

import ast
from pathlib import Path

import needs
from conftest import ROOT

SKIPS = {"skip", "skipif", "importorskip", "xfail"}


def skips(path: Path) -> list[ast.Call]:
    """Calls in a test file that skip tests."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in SKIPS]


def reasons(call: ast.Call) -> list[ast.expr]:
    """The expressions that a call gives as its reason."""
    return [word.value for word in call.keywords if word.arg == "reason"] or call.args[:1]


def says_what_is_needed(reason: ast.expr) -> bool:
    """Whether the reason is one of `needs`, or begins with "needs"."""
    if isinstance(reason, ast.Attribute):
        return isinstance(reason.value, ast.Name) and reason.value.id == "needs" and hasattr(needs, reason.attr)
    text = reason.values[0] if isinstance(reason, ast.JoinedStr) else reason
    return isinstance(text, ast.Constant) and str(text.value).startswith("needs ")


def test_every_skip_says_what_would_run_the_test():
    silent = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted({*(ROOT / "tests").rglob("*.py")} - {Path(needs.__file__)})
        for call in skips(path)
        if not all(map(says_what_is_needed, reasons(call)))
    ]
    assert not silent
