"""Imports run one way: nodes and training → serving → adapters → kvae; no room imports a library it must not know."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

MAY_IMPORT = {
    "kvae": set(),
    "adapters": {"kvae"},
    "serving": {"adapters", "kvae"},
    "nodes": {"serving", "adapters", "kvae"},
    "training": {"serving", "adapters", "kvae"},
}
MAY_NOT_KNOW = {
    "kvae": {"comfy", "comfy_api", "folder_paths", "diffusers", "av", "accelerate", "numpy"},
    "adapters": {"comfy", "comfy_api", "folder_paths", "diffusers", "av", "accelerate", "numpy"},
    "serving": {"comfy", "comfy_api", "folder_paths", "diffusers", "accelerate"},
    "nodes": {"diffusers", "accelerate"},
    "training": {"comfy", "comfy_api", "folder_paths"},
}


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules that a file imports, anywhere in it, as (package, module …); relative imports from the checkout on."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from ((*base, *module, name.name) for name in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    found = [(path, name[0]) for path in (ROOT / room).rglob("*.py") for name in imports(path)]
    assert found
    others = MAY_IMPORT.keys() - MAY_IMPORT[room] - {room}
    assert not [(str(path.relative_to(ROOT)), name) for path, name in found if name in others | MAY_NOT_KNOW[room]]


def test_the_parts_of_training_know_no_command():
    """training/runtime is shared by all trainings and imports none of them."""
    for path in (ROOT / "training" / "runtime").rglob("*.py"):
        inside = {name[1] for name in imports(path) if name[0] == "training" and len(name) > 1}
        assert inside <= {"runtime", "errors", "options"}, path


def test_only_vfl_knows_its_own_requirements():
    """Who trains adapters or runs nodes needs no requirements-vfl.txt, so nothing else may import what it installs."""
    rooms = [path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")]
    others = [path for path in rooms if "vfl" not in path.parts]
    assert len(others) < len(rooms)
    for path in others:
        for name in imports(path):
            assert name[0] not in ("peft", "webdataset") and name[:2] != ("training", "vfl"), path
