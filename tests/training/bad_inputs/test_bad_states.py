"""Malformed or damaged states of unfinished trainings are refused in one line; damaged logs do no harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from bad_rows import MY_ADAPTER, NESTED, NO_OBJECTS, TRAIN, Plant, Row, check, make_job, make_saved
from kvae_comfyui.kvae.files import Weights

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

saved = pytest.fixture(scope="module")(make_saved)

Change = Callable[[dict[str, torch.Tensor], dict[str, str]], object]


def goes_on(saved: Path, d: Path, change: Change = lambda tensors, metadata: None, log: bytes = b"") -> None:
    """Copy an unfinished run to another folder, change its state, and append to its log."""
    shutil.copytree(saved / "a", d / "a")
    with (d / "a" / "train.jsonl").open("ab") as file:
        file.write(log)
    path = d / "a" / "h.resume.safetensors"
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata = {key: text.replace(str(saved), str(d)) for key, text in metadata.items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def progress(**settings: object) -> Change:
    return lambda t, m: m.update(progress=json.dumps(json.loads(m["progress"]) | settings))


def first_tensor(kind: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        key = next(key for key in sorted(tensors) if key.startswith(kind))
        made = make(tensors.pop(key))
        if made is not None:
            tensors[key] = made

    return change


STATES: dict[str, Change] = {
    **{f"progress {text[:9]}": (lambda t, m, text=text: m.update(progress=text)) for text in (*NO_OBJECTS, "{}")},
    **{f"config {text[:9]}": (lambda t, m, text=text: m.update(config=text)) for text in (*NO_OBJECTS, "{}")},
    "no progress": lambda t, m: m.pop("progress"),
    "no config": lambda t, m: m.pop("config"),
    **{f"step {n}": progress(step=n) for n in (-1, 10**30, "1", None, 1.5)},
    **{f"epoch {n}": progress(epoch=n) for n in (-1, 10**30, None)},
    **{f"sums {n}": progress(sums=n) for n in ([], None, [1, 2], ["a", "b", "c"])},
    **{f"best {n}": progress(best_mse=n) for n in ({}, None, {"h2k": "a", "k2h": 1}, [])},
    **{f"no {kind}": first_tensor(kind, lambda tensor: None) for kind in ("live.h2k", "average.k2h", "best.h2k")},
    **{
        f"another {kind}": first_tensor(kind, lambda tensor: torch.zeros(3, 5))
        for kind in ("live.h2k", "average.k2h", "best.h2k", "optimiser0", "optimiser1")
    },
    "an unknown parameter": lambda t, m: t.update({"optimiser0.99999.moment": torch.zeros(3)}),
    "no number": lambda t, m: t.update({"optimiser0.x.moment": torch.zeros(3)}),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_malformed_state_is_an_error_of_one_line(kind, job, saved, tmp_path, capsys):
    goes_on(saved, tmp_path, STATES[kind])
    check(Row(TRAIN, "h.resume.safetensors"), tmp_path, job, capsys)


@pytest.mark.parametrize("tail", [b'{"step": 1, "val_', b"nonsense\n", b"null\n[]\n", b"\xff\n", NESTED.encode()])
def test_a_training_resumes_if_its_log_is_damaged(tail, job, saved, tmp_path, capsys):
    goes_on(saved, tmp_path, log=tail)
    check(Row(TRAIN, code=0), tmp_path, job, capsys)
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "val_h2k" in row] == [0, 1]


def beside_a_log(content: bytes) -> Plant:
    def plant(d: Path, job: Path) -> None:
        shutil.copyfile(job / "h2k.safetensors", d / "h2k.safetensors")
        (d / "train.jsonl").write_bytes(content)

    return plant


LOGS = [
    Row(MY_ADAPTER, "", beside_a_log(content), code=0)
    for content in (
        *(b'{"step": 1, "val_', b"null\n[]\n3\n", b'{"step": "x", "val_h2k": []}\n', b"\xff", NESTED.encode()),
        *(b'{"step": 1, "val_h2k": NaN}\n{"step": 1e400, "val_h2k": 1}\n', b'{"val_h2k": 1}\n{"step": 1}\n'),
    )
]


@pytest.mark.parametrize("row", LOGS, ids=Row.name)
def test_a_damaged_log_does_not_stop_an_evaluation(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
