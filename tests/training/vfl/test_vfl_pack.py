"""vfl-pack: shards that webdataset reads, manifests that are never wrong, and nothing lost, doubled or half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import needs
from command import refusal
from conftest import ROOT
from kvae_comfyui.training.vfl import pack as packing
from kvae_comfyui.training.vfl.shards import read_manifest, shard_files
from kvae_comfyui.training.vfl.tars import entries
from vfl_pictures import make_folder, named, pack, picture_bytes

wds = needs.package("webdataset", "requirements-vfl.txt")
COUNTS = {"Ash": 30, "brock ": 11, "misty": 4, "solo": 1}


@pytest.fixture
def small(monkeypatch):
    """Shards of about five pictures."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 700)


def held(out: Path, split: str) -> dict[bytes, tuple[str, str]]:
    """Every picture of a split, read by webdataset: its bytes → identity and source; each is there once."""
    urls = [str(path) for path in shard_files(out, split)]
    found = {}
    for sample in wds.WebDataset(urls, shardshuffle=False) if urls else ():
        (data,) = (sample[suffix] for suffix in ("png", "jpg", "jpeg", "webp") if suffix in sample)
        about = json.loads(sample["json"])
        assert data not in found
        found[data] = about["identity"], about["source"]
    return found


def check(pictures: Path, out: Path) -> None:
    """All pictures are packed, and the manifests count them."""
    train, val = held(out, "train"), held(out, "val")
    files = {path.read_bytes(): path.relative_to(pictures) for path in pictures.rglob("*.png")}
    assert not train.keys() & val.keys() and (train | val).keys() == files.keys()
    for data, (identity, source) in (train | val).items():
        assert source == files[data].as_posix() and identity == files[data].parts[0].strip().lower()
    for split, found in (("train", train), ("val", val)):
        if found:
            counts = read_manifest(out / "manifest" / f"{split}_manifest.csv").counts
            assert counts == Counter(identity for identity, _ in found.values())
    left = [path for path in out.rglob("*") if path.name.startswith(".")]
    assert not left


def test_webdataset_reads_what_is_packed(tmp_path, small, capsys):
    make_folder(tmp_path / "in", COUNTS)
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    check(tmp_path / "in", tmp_path / "out")
    out = capsys.readouterr().out
    assert "train: 42 pictures of 4 identities, 1 to 27 of each, in " in out
    assert "val: 4 pictures of 2 identities, 1 to 3 of each, in 1 shard\n" in out  # a tenth, to the nearest: 3, 1, 0, 0
    assert "46 pictures packed, 0 already there, 0 skipped, 0 doubles left out" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "index", "manifest"]


def test_the_same_pictures_give_the_same_bytes(tmp_path, small):
    make_folder(tmp_path / "in", COUNTS)
    for name in ("one", "two"):
        assert pack(tmp_path / "in", tmp_path / name) == 0
        time.sleep(0.01)
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert "index" in path.parts or path.read_bytes() == other.read_bytes()


def test_a_shard_mixes_identities(tmp_path):
    """A stream of one shard must not show one identity for long."""
    make_folder(tmp_path / "in", named((40, 40)))
    assert pack(tmp_path / "in", tmp_path / "out", "--val-share", "0") == 0
    names = [each.about["identity"] for each in entries(tmp_path / "out/data/train/train-000000.tar")]
    changes = sum(a != b for a, b in pairwise(names))
    assert 25 < changes < 55  # 39.5 ± 4.4 in random order, 1 in order


@pytest.mark.parametrize(("share", "val"), [("0", 0), ("0.25", 8 + 3 + 1 + 0), ("1", 46)])
def test_val_gets_its_share_of_each_identity(tmp_path, share, val):
    make_folder(tmp_path / "in", COUNTS)
    assert pack(tmp_path / "in", tmp_path / "out", "--val-share", share) == 0
    assert len(held(tmp_path / "out", "val")) == val
    check(tmp_path / "in", tmp_path / "out")


def test_more_pictures_are_added_and_none_moves(tmp_path, small, capsys):
    make_folder(tmp_path / "in", COUNTS)
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "data").rglob("*.tar")}
    for i in range(20):
        (tmp_path / "in" / "misty" / f"new {i}.png").write_bytes(picture_bytes(1000 + i))
    capsys.readouterr()
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert "20 pictures packed, 46 already there" in capsys.readouterr().out
    check(tmp_path / "in", tmp_path / "out")
    assert all(path.read_bytes() == data for path, data in before.items())
    assert read_manifest(tmp_path / "out/manifest/val_manifest.csv").counts["misty"] == 2  # of 24
    again = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == again


def test_a_deleted_shard_is_packed_again(tmp_path, small):
    make_folder(tmp_path / "in", COUNTS)
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    for path in shard_files(tmp_path / "out", "train")[1:3]:
        path.unlink()
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    check(tmp_path / "in", tmp_path / "out")


def test_a_picture_is_packed_once_whatever_its_name(tmp_path, capsys):
    make_folder(tmp_path / "in", {"ash": 3, "brock": 2})
    shutil.copy(tmp_path / "in/ash/0000.png", tmp_path / "in/ash/copy.png")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert "5 pictures packed, 0 already there, 0 skipped, 1 doubles left out" in capsys.readouterr().out
    shutil.copy(tmp_path / "in/ash/0001.png", tmp_path / "in/brock/x.png")
    assert pack(tmp_path / "in", tmp_path / "out") == 1
    err = capsys.readouterr().err.splitlines()
    assert err == [f"skipped: {tmp_path}/in/brock/x.png: the same picture as one of 'ash'; delete one of them"]
    assert len(held(tmp_path / "out", "train")) + len(held(tmp_path / "out", "val")) == 5


def test_what_cannot_be_packed_is_named_at_the_end(tmp_path, capsys):
    make_folder(tmp_path / "in", {"ash": 12})
    (tmp_path / "in/ash/bad.jpg").write_bytes(b"no picture")
    (tmp_path / "in/ash/cut.png").write_bytes(picture_bytes(99)[:80])
    (tmp_path / "in/loose.png").write_bytes(picture_bytes(98))
    (tmp_path / "in/ash/gone.webp").symlink_to(tmp_path / "nowhere")
    os.truncate(shutil.copy(tmp_path / "in/ash/bad.jpg", tmp_path / "in/ash/large.jpg"), 65 << 20)
    (tmp_path / "in/ash/notes.txt").write_text("a caption")
    (tmp_path / "in/ash/._0000.png").write_text("macOS leaves these")
    (tmp_path / "in/empty").mkdir()
    assert pack(tmp_path / "in", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "12 pictures packed, 0 already there, 5 skipped" in out
    lines = sorted(line for line in err.splitlines() if line.startswith("skipped"))
    ash = f"skipped: {tmp_path}/in/ash"
    assert lines[0] == f"{ash}/bad.jpg: not a JPEG, PNG or WebP file; expected a picture that can be read"
    assert lines[1].startswith(f"{ash}/cut.png: ") and lines[1].endswith("; expected a picture that can be read")
    assert lines[2] == f"{ash}/gone.webp: no such file"
    assert lines[3] == f"{ash}/large.jpg: more than 64 MiB; no such file is that large"
    assert lines[4] == f"skipped: {tmp_path}/in/loose.png: it lies in no folder of an identity; move it into one"


def test_manifests_are_written_anew_from_the_shards_alone(tmp_path, capsys):
    """Also for shards of another program, whose identities have another key."""
    root = tmp_path / "out"
    (root / "data/train").mkdir(parents=True)
    with wds.ShardWriter(str(root / "data/train/train-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            about = {"pokemon": i % 2 or "Mew ", "source": 5}
            writer.write({"__key__": f"any/{i}", "jpg": picture_bytes(i, "JPEG"), "json": about})
    assert "no identity under 'identity' (its keys: pokemon, source)" in refusal(
        ["vfl-pack", "--output-root", str(root)], capsys
    )
    assert pack("", root, "--identity-key", "pokemon") == 0
    assert (root / "manifest/train_manifest.csv").read_text() == "pokemon,count\n1,3\nmew,4\n"
    assert capsys.readouterr().out == "train: 7 pictures of 2 identities, 3 to 4 of each, in 3 shards\n"
    make_folder(tmp_path / "in", {"mew": 2})
    assert pack(tmp_path / "in", root, "--identity-key", "pokemon", "--val-share", "0") == 0
    assert read_manifest(root / "manifest/train_manifest.csv", "pokemon").counts == {"1": 3, "mew": 6}


def start(tmp_path):
    return subprocess.Popen(
        [
            *(sys.executable, Path(__file__).with_name("small_shards.py"), "vfl-pack"),
            *("--pictures-root", tmp_path / "in", "--output-root", tmp_path / "out"),
        ],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_shards(tmp_path, process, count):
    deadline = time.time() + 100
    while len(shard_files(tmp_path / "out", "train")) < count and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)


@needs.posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_continued(tmp_path, number, small):
    """It takes a start of a process; and an interrupted run's manifest counts the shards that are there."""
    make_folder(tmp_path / "in", named((300,)))
    process = start(tmp_path)
    wait_for_shards(tmp_path, process, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
    assert 3 <= len(shard_files(tmp_path / "out", "train")) < 50
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "interrupted; the same command continues from what is saved"
        counts = read_manifest(tmp_path / "out/manifest/train_manifest.csv").counts
        assert counts == {"who0": len(held(tmp_path / "out", "train"))}
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    check(tmp_path / "in", tmp_path / "out")


@needs.posix
def test_two_runs_do_not_write_into_one_folder(tmp_path, capsys):
    make_folder(tmp_path / "in", named((300,)))
    process = start(tmp_path)
    wait_for_shards(tmp_path, process, 1)
    argv = ["vfl-pack", "--pictures-root", str(tmp_path / "in"), "--output-root", str(tmp_path / "out")]
    line = refusal(argv, capsys)
    process.kill()
    process.communicate()
    assert "another vfl-pack is writing there; wait until it has finished" in line


@needs.linux
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    make_folder(tmp_path / "in", {"ash": 12})
    for i in range(3):
        (tmp_path / "in/ash" / f"large{i}.png").write_bytes(picture_bytes(i, size=(400, 400)))
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code += "from kvae_comfyui.training.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["vfl-pack", "--pictures-root", str(tmp_path / "in"), "--output-root", str(tmp_path / "out")]
    out = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2
    last = out.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/out/data/") and "File too large" in last
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    def line(*more, pictures=tmp_path / "in"):
        argv = ["vfl-pack", "--pictures-root", str(pictures), "--output-root", str(tmp_path / "out"), *more]
        return refusal(argv, capsys)

    assert "in: no such folder" in line()
    (tmp_path / "in/ash").mkdir(parents=True)
    assert "no pictures in it (jpg, jpeg, png, webp)" in line()
    assert "no shards in it; name the pictures to pack by --pictures-root" in line(pictures="")
    (tmp_path / "in/ash/a.png").write_bytes(picture_bytes(0))
    assert "--val-share is 1.5; expected at least 0, at most 1" in line("--val-share", "1.5")
    assert "--identity-key is count, which has another meaning" in line("--identity-key", "count")
    assert not (tmp_path / "out").exists()
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    manifest = tmp_path / "out/manifest/train_manifest.csv"
    good = manifest.read_text()
    manifest.write_text("nonsense")
    assert "not a manifest (its columns are nonsense; expected identity, count); correct it, or delete it" in line()
    manifest.write_text(good)
    shard = tmp_path / "out/data/train/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert "train-000000.tar: damaged, cut short, or not a tar" in line()


def test_nothing_is_left_if_no_picture_can_be_read(tmp_path, capsys):
    (tmp_path / "in/ash").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "in/ash" / f"{i}.png").write_bytes(b"no picture")
    assert pack(tmp_path / "in", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: none of the 3 pictures could be packed"
    assert not (tmp_path / "out").exists()


@needs.posix
def test_names_in_other_encodings_are_packed_or_named(tmp_path, capsys):
    folder = os.fsencode(tmp_path / "in")
    for name in (b"caf\xe9/a.png", b"ash/caf\xe9.png"):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(picture_bytes(len(name)))
    for packed in ("1 pictures packed, 0 already", "0 pictures packed, 1 already"):
        assert pack(tmp_path / "in", tmp_path / "out") == 1
        out, err = capsys.readouterr()
        assert packed in out and "an identity named 'caf\\udce9', which is not UTF-8; rename it" in err


def test_without_webdataset_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "in", {"ash": 2})
    monkeypatch.setitem(sys.modules, "webdataset", None)
    argv = ["vfl-pack", "--pictures-root", str(tmp_path / "in"), "--output-root", str(tmp_path / "out")]
    assert "webdataset is not installed: pip install -r requirements-vfl.txt" in refusal(argv, capsys)
    assert not list((tmp_path / "out").rglob("*.tar"))
