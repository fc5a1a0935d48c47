"""Input files and folders that are missing or of the wrong kind are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import needs
from bad_rows import (
    ADAPTERS_COMMAND,
    DEMO,
    EVALUATE,
    EXTRACT,
    FETCH,
    PACK,
    PIXELS,
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


def plant_odd_folders(d: Path, job: Path) -> None:
    plant_places(d, job)
    for name in ("empty", "videos"):
        (d / name).mkdir()
    (d / "videos" / "a.mp4").write_text("no video")


FILES = ["{d}/absent", "{d}/pipe", "{d}/loop", "{d}/{long}", "{d}/a{nul}b", "{d}/{latin}", "{d}/file", "{d}/file/x"]
READING = [
    Row(f"{command} {option} {place}", "", plant_odd_folders)
    for command, option in (
        *((EXTRACT, "--videos-root"), (PACK, "--latent-root"), (UNPACK, "--latent-root"), (TRAIN, "--latent-root")),
        *((TRAIN, "--val-latent-root"), (EVALUATE, "--latent-root"), (EVALUATE, "--train-latent-root")),
        *((PIXELS, "--videos-root"), (EVALUATE, "--adapter-h2k"), (RECONSTRUCT, "--video-path")),
        *((RECONSTRUCT, "--kvae"), (EXTRACT, "--hunyuan-vae"), (TINY_COMMAND, "--videos-root"), (DEMO, "--videos")),
        *((TINY_COMMAND, "--start-from"), (PIXELS, "--kvae"), (ADAPTERS_COMMAND, "--videos-root")),
    )
    for place in (*FILES, "{d}/empty")
]  # fmt: skip
READING += [
    Row(EXTRACT + " --videos-root {d}/videos", "none of the 1 videos", plant_odd_folders, leaves=()),
    *(Row(f"{EXTRACT} --kvae={x}", "") for x in ("-x/y", "a" * 60 + "/" + "b" * 60, "a/b/c", "a--b/c", "a/..", "x/")),
    *(Row(f"{FETCH} --model {x}", "--model") for x in (
        *("''", "a/b", "a/b/../../c.safetensors", "a/b//etc/x.safetensors", "a/b/c.pt", "a/b/./c.safetensors"),
        *("a--b/c/d.safetensors", "a/b/c{nul}.safetensors"),
    )),
    Row(f"{FETCH} --model=-x/y/z.safetensors", "--model"),
    Row(TINY_COMMAND, "9 frames; expected at least 17"),
]  # fmt: skip


@pytest.mark.parametrize("row", READING, ids=Row.name)
def test_a_file_or_folder_that_cannot_be_read_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
