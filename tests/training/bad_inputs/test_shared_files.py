"""Files that people share name no folder of the machine that wrote them, and every JSON reader accepts them."""

from __future__ import annotations

import json

import pytest

import needs
from bad_rows import EXTRACT, MY_ADAPTER, PACK, PIXELS, RECONSTRUCT, TRAIN, adapter, fill, make_job
from kvae_comfyui.training.cli import main

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)


def test_no_file_that_people_share_names_a_folder_of_this_machine(job, tmp_path):
    assert main(fill(EXTRACT + " --max-clips 4", tmp_path, job)) == 0
    assert main(fill(PACK + " --latent-root {d}/l", tmp_path, job)) == 0
    assert main(fill(TRAIN, tmp_path, job)) == 0
    mine = " --adapter-h2k {d}/a/h.safetensors --adapter-k2h {d}/a/k.safetensors"
    assert main(fill(PIXELS + mine, tmp_path, job)) == 0
    assert main(fill(RECONSTRUCT, tmp_path, job)) == 0
    shared = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in shared} >= {".json", ".jsonl", ".safetensors", ".html", ".md", ".txt", ".png"}
    telling = str(tmp_path.parent).encode()
    assert [path.name for path in shared if telling in path.read_bytes()] == []


def test_no_json_file_contains_nan_or_infinity(job, tmp_path):
    """Only Python reads and writes NaN and Infinity in JSON; other readers refuse the file."""

    def refuse(text: str) -> None:
        raise AssertionError(text)

    adapter(metrics='{"val_mse": NaN, "more": [Infinity]}', training='{"pairs": -Infinity}')(tmp_path, job)
    assert main(fill(MY_ADAPTER, tmp_path, job)) == 0
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
