"""Folders, shards and manifests that vfl-pack cannot use are refused in one line, and change no file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from test_tars import header, sample, written

import needs
from bad_rows import Row, check, plant_places
from vfl_pictures import make_folder, pack, picture_bytes

needs.package("webdataset", "requirements-vfl.txt")
pytestmark = needs.posix

PACK = "vfl-pack --pictures-root {job}/in --output-root {d}/set"
MORE = "vfl-pack --pictures-root {job}/in --output-root {d}/set --val-share 0"
NO_PLACES = ["{d}/file", "{d}/pipe", "{d}/loop", "{d}/loop/x", "{d}/{long}", "{d}/a{nul}b", "{d}/file/x"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder of pictures, and what is packed from it."""
    root = tmp_path_factory.mktemp("job")
    make_folder(root / "in", {"ash": 12, "brock": 3})
    assert pack(root / "in", root / "set") == 0
    return root


def plant_set(name: str, content: bytes | None):
    """A copy of the packed set in which a file has this content; with None it is a named pipe."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "set", d / "set")
        path = d / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)

    return plant


def plant_shard(*files: tuple[str, bytes]):
    """A copy of the packed set with one more shard, of these files."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "set", d / "set")
        written(d / "set/data/train/train-000007.tar", files)

    return plant


def plant_no_pictures(d: Path, job: Path) -> None:
    (d / "in" / "ash").mkdir(parents=True)
    (d / "in" / "ash" / "clip.mp4").write_text("a video")


def plant_only_bad_pictures(d: Path, job: Path) -> None:
    (d / "in" / "ash").mkdir(parents=True)
    os.mkfifo(d / "in" / "ash" / "pipe.png")
    (d / "in" / "ash" / "text.jpg").write_text("a text")
    (d / "in" / "ash" / "folder.png").symlink_to(d / "in" / "ash" / "folder.png")
    (d / "in" / "loose.png").write_bytes(picture_bytes(0))


def plant_data_in_the_way(d: Path, job: Path) -> None:
    (d / "set").mkdir()
    (d / "set" / "data").write_text("a file")


SHARD, MANIFEST = "data/train/train-000000.tar", "manifest/train_manifest.csv"
ROWS = [
    *(Row(f"{PACK} --pictures-root {place}", "", plant_places) for place in (*NO_PLACES, "{d}/folder", "{d}/absent")),
    *(Row(f"{PACK} --output-root {place}", "--output-root", plant_places) for place in (*NO_PLACES, "''", "/proc/x")),
    Row(PACK + " --pictures-root {d}/in", "no pictures in it", plant_no_pictures),
    Row(PACK + " --pictures-root {d}/in", "none of the 4 pictures could be packed", plant_only_bad_pictures),
    Row(PACK + " --val-share nan", "--val-share"),
    Row(PACK + " --identity-key source", "has another meaning"),
    Row(PACK + " --identity-key ''", "--identity-key is empty"),
    Row(PACK, "a part of it is a file", plant_data_in_the_way),
    Row("vfl-pack --output-root {d}/set", "no shards in it"),
    Row(MORE + " --identity-key name", "expected name, count", plant_set("x/y", b"")),
    *(Row(MORE, "train_manifest.csv", plant_set(MANIFEST, text)) for text in (b"", b"a,b\n", b"\xff\n", None)),
    *(Row(MORE, "train-000000.tar", plant_set(SHARD, text)) for text in (b"", b"text", bytes(400), None)),
    Row(MORE, "damaged", plant_set(SHARD, header(b"a.png", b"\xff" * 8 + b"\xff\xff\xfa\x00") + bytes(2048))),
    Row(MORE, "has no x.json", plant_shard(("x.png", b""))),
    Row(MORE, "no identity under 'identity'", plant_shard(*sample("x", about=b"{}"))),
    Row(MORE, "x.json: ", plant_shard(*sample("x", about=b"[" * 100_000))),
]


@pytest.mark.parametrize("row", ROWS, ids=Row.name)
def test_what_cannot_be_packed_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


def test_an_identity_that_no_terminal_should_see_is_escaped(tmp_path, capsys):
    (tmp_path / "in" / "a\x1b[31m").mkdir(parents=True)
    (tmp_path / "in" / "a\x1b[31m" / "bad\n.png").write_text("no picture")
    (tmp_path / "in" / "a\x1b[31m" / "good.png").write_bytes(picture_bytes(0))
    assert pack(tmp_path / "in", tmp_path / "set") == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "a\\x1b[31m/bad\\n.png: not a JPEG" in err
