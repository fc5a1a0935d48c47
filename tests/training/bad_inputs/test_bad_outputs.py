"""Outputs that cannot be written, or would overwrite another file, are refused in one line before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import needs
from bad_rows import (
    ADAPTERS_COMMAND,
    DECODE,
    DEMO,
    ENCODE,
    EVALUATE,
    EXTRACT,
    FETCH,
    PACK,
    RECONSTRUCT,
    TINY_COMMAND,
    TRAIN,
    UNPACK,
    Row,
    check,
    make_job,
    plant_places,
)

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

FOLDERS = [
    *((EXTRACT, "--output-root"), (PACK, "--output-root"), (UNPACK, "--output-root"), (EVALUATE, "--output-root")),
    *(
        (DEMO, "--output-root"),
        (FETCH, "--output"),
        (DECODE, "--output"),
        (ENCODE, "--output"),
        (ADAPTERS_COMMAND, "--output"),
    ),
]
TARGETS = [(TRAIN, "--out-h2k"), (TRAIN, "--out-k2h"), (RECONSTRUCT, "--output"), (TINY_COMMAND, "--output")]
NO_PLACES = ["{d}/file/under", "/proc/x/y", "/sys/x/y", "{d}/{long}", "{d}/{long}/x", "{d}/loop/x", "{d}/a{nul}b", "''"]
NO_FOLDERS = [*NO_PLACES, "{d}/file", "{d}/pipe"]
NO_TARGETS = [*NO_PLACES, "{d}/folder", "{d}/pipe", "/dev/null"]
OUTPUTS = [
    Row(f"{command} {option} {place}", option, plant_places)
    for commands, places in ((FOLDERS, NO_FOLDERS), (TARGETS, NO_TARGETS))
    for command, option in commands
    for place in places
]


def plant_adapter_named_as_an_output(d: Path, job: Path) -> None:
    (d / "e").mkdir()
    shutil.copyfile(job / "h2k.safetensors", d / "e" / "evaluation.txt")


def plant_a_video(d: Path, job: Path) -> None:
    shutil.copyfile(job / "videos" / "v_Wave_g01_c01.mp4", d / "a.mp4")


def plant_pairs_of_ones_own(d: Path, job: Path) -> None:
    shutil.copytree(job / "latents", d / "demo" / "pairs" / "train")


OVERWRITING = [
    Row(DEMO, "that no demo has made", plant_pairs_of_ones_own),
    Row(TRAIN + " --out-k2h {d}/a/./h.safetensors", "overwrite"),
    Row(TRAIN + " --out-k2h {d}/a/../a/h.safetensors", "overwrite"),
    Row(TRAIN + " --out-h2k {d}/a/train.json"),
    Row(TRAIN + " --out-k2h {d}/a/train.jsonl"),
    Row(TRAIN + " --out-k2h {d}/a/report.html"),
    Row(TRAIN + " --out-k2h {d}/a/h.resume.safetensors"),
    Row(EVALUATE + " --adapter-h2k {d}/e/evaluation.txt", "overwrite", plant_adapter_named_as_an_output),
    Row(TINY_COMMAND + " --start-from {d}/t.safetensors", "overwrite"),
    Row(RECONSTRUCT + " --video-path {d}/a.mp4 --output {d}/./a.mp4", "overwrite", plant_a_video),
    Row(TINY_COMMAND + " --output {d}/t.jsonl", "expected a name that ends in .safetensors"),
]


@pytest.mark.parametrize("row", OUTPUTS, ids=Row.name)
def test_an_output_that_cannot_be_written_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


@pytest.mark.parametrize("row", OVERWRITING, ids=Row.name)
def test_an_output_that_would_overwrite_another_file_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
