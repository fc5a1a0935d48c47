"""The errors of the pack have short names, as ComfyUI's dialog shows them, and cross processes."""

import ast
import importlib
import pickle

import pytest

from conftest import ROOT
from kvae_comfyui.kvae import KVAE, BudgetError, plan_decode
from small_models import SMALL

ROOMS = ("kvae", "adapters", "serving", "training", "nodes")


def error_classes() -> list[tuple[str, str]]:
    """(module, name) of the classes in the rooms that are errors by the names of their bases, without private ones."""
    found = []
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        module = ".".join(("kvae_comfyui", *path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = [ast.unparse(base) for base in node.bases]
                if any(base.endswith(("Error", "Exception")) for base in bases):
                    found.append((module, node.name))
    return found


def test_the_known_errors_are_found():
    assert {"WeightsError", "BudgetError", "UserError"} <= {name for _, name in error_classes()}


@pytest.mark.parametrize(("module", "name"), error_classes())
def test_every_error_is_shown_as_kvae_and_its_name(module, name):
    cls = getattr(importlib.import_module(module), name)
    assert f"{cls.__module__}.{cls.__qualname__}" == f"kvae.{name}"


@pytest.mark.parametrize(("module", "name"), error_classes())
def test_every_error_can_be_pickled(module, name):
    cls = getattr(importlib.import_module(module), name)
    error = cls.__new__(cls, "no file", 2)
    error.path = "x"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.args, again.path) == (error.args, error.path)


def test_a_budget_error_keeps_its_words_and_its_least_plan():
    kvae = KVAE(SMALL["1.0"])
    with pytest.raises(BudgetError, match="at least") as caught:
        plan_decode(kvae, (1, 16, 2, 4, 4), budget=1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.least == caught.value.least
