"""Packing and unpacking: whatever was deleted, damaged, killed or written by others, no pair is lost or doubled."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from conftest import ROOT
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data import packing, shards
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.pairs import Pair, find_pairs, read_pair, write_pair
from kvae_comfyui.training.errors import UserError

MANIFEST = {
    "settings": {"height": 32},
    "hunyuan_vae": {"space": "a", "sha256": "1"},
    "kvae": {"space": "b", "sha256": "2"},
}


def make_pairs(folder, names):
    for name in names:
        z = torch.randn(16, 3, 4, 6)
        write_pair(folder / f"{name}.safetensors.zst", Pair(z, z.flip(0), None))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Nine pairs in three shards; `pack()` packs again."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 3 * 2 * 16 * 3 * 4 * 6 * 2)
    make_pairs(tmp_path / "pairs", [f"v{i}" for i in range(9)])
    assert pack(tmp_path) == 0
    assert shard_names(tmp_path) == ["00000", "00001", "00002"]
    return tmp_path


def pack(folder):
    return main(["pack", "--latent-root", str(folder / "pairs"), "--output-root", str(folder / "shards")])


def unpack(folder, out="again"):
    return main(["unpack", "--latent-root", str(folder / "shards"), "--output-root", str(folder / out)])


def shard_names(folder):
    return sorted(path.stem for path in (folder / "shards").glob("*.safetensors"))


def check_same(folder):
    """The shards hold each of the pairs once."""
    files, store = open_pairs(folder / "pairs"), open_pairs(folder / "shards")
    assert sorted(store.name(i) for i in range(len(store))) == [files.name(i) for i in range(len(files))]
    for i in range(len(store)):
        assert torch.equal(store[i].z_h, read_pair(folder / "pairs" / f"{store.name(i)}.safetensors.zst").z_h)


@pytest.mark.parametrize("deleted", [["00000"], ["00001"], ["00002"], ["00000", "00002"], ["00000", "00001", "00002"]])
def test_a_deleted_shard_is_packed_again_without_loss(packed, capsys, deleted):
    kept = {name: (packed / "shards" / f"{name}.safetensors").read_bytes() for name in shard_names(packed)}
    for name in deleted:
        (packed / "shards" / f"{name}.safetensors").unlink()
        del kept[name]
    with pytest.raises(UserError, match="is missing; pack again"):
        open_pairs(packed / "shards")
    for _ in range(2):
        assert pack(packed) == 0
        check_same(packed)
    assert f"{3 * len(deleted)} pairs packed, {9 - 3 * len(deleted)} already there" in capsys.readouterr().out
    for name, data in kept.items():
        assert (packed / "shards" / f"{name}.safetensors").read_bytes() == data
    make_pairs(packed / "pairs", ["v9"])
    assert pack(packed) == 0
    check_same(packed)


def test_a_damaged_shard_is_named_and_what_is_said_of_it_helps(packed, capsys):
    shard = packed / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    capsys.readouterr()
    assert pack(packed) == 2
    err = capsys.readouterr().err
    assert "00001.safetensors: damaged" in err and "delete it and pack again" in err
    shard.unlink()
    assert pack(packed) == 0
    check_same(packed)


def test_a_copied_shard_is_refused(packed, capsys):
    shard = packed / "shards" / "00001.safetensors"
    (packed / "shards" / "00001 (copy).safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="is not in index.json; pack again"):
        open_pairs(packed / "shards")
    assert pack(packed) == 2
    assert "00001.safetensors: holds 'v3', as does 00001 (copy).safetensors; delete one" in capsys.readouterr().err
    shard.unlink()  # either of them
    assert pack(packed) == 0
    check_same(packed)


def test_shards_that_an_unfinished_pack_added_are_not_overlooked(packed):
    index = (packed / "shards" / "index.json").read_bytes()
    make_pairs(packed / "pairs", ["v9"])
    assert pack(packed) == 0
    (packed / "shards" / "index.json").write_bytes(index)  # as if killed just before
    with pytest.raises(UserError, match=r"00003.safetensors: is not in index.json; pack again"):
        open_pairs(packed / "shards")
    assert pack(packed) == 0
    check_same(packed)


def test_an_index_that_lists_a_shard_twice_is_refused(packed):
    path = packed / "shards" / "index.json"
    index = json.loads(path.read_text())
    index["shards"].append(index["shards"][1])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lists 00001.safetensors twice; pack again"):
        open_pairs(packed / "shards")
    assert pack(packed) == 0
    check_same(packed)


ENTRY = {"file": "00000.safetensors", "pairs": 3, "z_h": [16, 3, 4, 6], "z_k": [16, 3, 4, 6]}
WRONG = [
    *({"pairs": number} for number in (-3, 0, 10**30, 1.5, "3", None, True)),
    *({"z_h": z} for z in ([], None, 16, "16", [16, 3, 4], [-16, 3, 4, 6], [1.5, 3, 4, 6], [10**30] * 4)),
    *({"file": name} for name in (3, None, "", "..", "../00000.safetensors", "/etc/passwd", "a/b.safetensors")),
]
INDEXES_OF_OTHERS = [
    "", "[]", "null", "[" * 100_000, "{}", '{"format": 3}', json.dumps({"format": shards.FORMAT}),
    *(json.dumps({"format": shards.FORMAT, "shards": entries}) for entries in (3, None, [3], [None], [[]], [{}])),
    *(json.dumps({"format": shards.FORMAT, "shards": [ENTRY | wrong]}) for wrong in WRONG),
]  # fmt: skip


@pytest.mark.parametrize("text", INDEXES_OF_OTHERS, ids=range(len(INDEXES_OF_OTHERS)))
def test_an_index_that_is_none_is_a_line(packed, text, capsys):
    (packed / "shards" / "index.json").write_text(text)
    with pytest.raises(UserError, match="not the index of packed pairs.*; pack them again"):
        open_pairs(packed / "shards")
    assert pack(packed) == 0  # which makes it anew
    check_same(packed)


def replace_in_shard(path, **tensors):
    held = load_file(path)
    save_file({name: t for name, t in (held | tensors).items() if t is not None}, path, {"format": shards.FORMAT})


CLIPS_OF_OTHERS = [
    "", "null", "{}", "[" * 100_000, "[1, 2, 3]", '["v0", "v1", "v2"]', '[{"clip": "v0"}, {"clip": "v1"}]',
    '[{"clip": "v0"}, {"clip": "v1"}, {"clip": 3}]', '[{"clip": "v0"}, {"clip": "v1"}, {"source": null}]',
]  # fmt: skip


@pytest.mark.parametrize("text", CLIPS_OF_OTHERS, ids=range(len(CLIPS_OF_OTHERS)))
def test_clips_that_are_no_list_of_names_are_a_line(packed, text, capsys):
    """Fewer names than pairs would leave pairs out."""
    shard = packed / "shards" / "00000.safetensors"
    replace_in_shard(shard, clips=torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8))
    for command in (unpack, pack):
        assert command(packed) == 2
        assert "does not say which clips it holds" in capsys.readouterr().err
    assert not (packed / "again").exists()
    shard.unlink()
    assert pack(packed) == 0
    check_same(packed)


def test_sources_of_others_are_left_out(packed):
    sources = [None, [], {"video": "../../x", "first": 0}]
    text = json.dumps([{"clip": f"v{i}", "source": source} for i, source in enumerate(sources)])
    replace_in_shard(
        packed / "shards" / "00000.safetensors", clips=torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    )
    assert [open_pairs(packed / "shards")[i].source for i in range(3)] == [None] * 3


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"mean_h": None}, "mean_h: missing, or not as in a shard"),
        ({"std_k": torch.zeros(3, 4)}, "std_k: missing, or not as in a shard"),
        ({"clips": None}, "clips: missing, or not as in a shard"),
        ({"z_h": torch.zeros(3, 16)}, "expected two"),
    ],
)
def test_a_shard_without_a_part_is_a_line(packed, capsys, tensors, words):
    replace_in_shard(packed / "shards" / "00000.safetensors", **tensors)
    assert pack(packed) == 2
    assert words in capsys.readouterr().err


def test_values_that_are_no_numbers_are_not_trained_on(packed):
    z = load_file(packed / "shards" / "00000.safetensors")["z_h"]
    z[1, 0, 0, 0, 0] = float("nan")
    replace_in_shard(packed / "shards" / "00000.safetensors", z_h=z)
    pairs = open_pairs(packed / "shards")
    assert pairs[0].z_h.isfinite().all()
    for read in (lambda: pairs[1], lambda: pairs.crops(np.array([1]), None, 0, 0, torch.device("cpu"))):
        with pytest.raises(UserError, match="not finite numbers"):
            read()
    replace_in_shard(packed / "shards" / "00000.safetensors", z_h=z.float())
    with pytest.raises(UserError, match=r"F16, F32, not as index.json says"):
        open_pairs(packed / "shards")[0]


def test_two_clips_of_one_name_are_not_unpacked_over_each_other(packed, capsys):
    replace_in_shard(
        packed / "shards" / "00001.safetensors",
        clips=load_file(packed / "shards" / "00000.safetensors")["clips"],
    )
    assert unpack(packed) == 2
    assert "two clips are called 'v0'; one would overwrite the other" in capsys.readouterr().err
    assert not (packed / "again").exists()


def test_unpacking_goes_on_and_takes_no_other_pair_for_its_own(packed, capsys):
    assert unpack(packed) == 0
    (packed / "again" / "v4.safetensors.zst").unlink()
    capsys.readouterr()
    assert unpack(packed) == 0
    assert "1 pairs unpacked, 8 already there" in capsys.readouterr().out
    assert [path.read_bytes() for path in find_pairs(packed / "again")] == [
        path.read_bytes() for path in find_pairs(packed / "pairs")
    ]
    z = torch.zeros(16, 5, 4, 6)
    write_pair(packed / "again" / "v4.safetensors.zst", Pair(z, z, None))
    assert unpack(packed) == 2
    assert "v4.safetensors.zst: not the pair that the shards hold under this name" in capsys.readouterr().err


def test_pairs_and_shards_keep_to_folders_of_their_own(packed, capsys):
    for out in ("pairs", "pairs/shards", "."):
        argv = ["pack", "--latent-root", str(packed / "pairs"), "--output-root", str(packed / out)]
        assert main(argv) == 2
        assert "one lies in the other" in capsys.readouterr().err
    make_pairs(packed / "shards", ["v9"])
    with pytest.raises(UserError, match="holds pairs and shards"):
        open_pairs(packed / "shards")


def test_refusals_leave_nothing(tmp_path, capsys):
    make_pairs(tmp_path / "pairs", ["a"])
    (tmp_path / "pairs" / "b.safetensors.zst").write_bytes(b"no pair")
    assert pack(tmp_path) == 2
    assert not (tmp_path / "shards").exists()
    (tmp_path / "pairs" / "b.safetensors.zst").unlink()
    assert pack(tmp_path) == 0
    shard = tmp_path / "shards" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert unpack(tmp_path) == 2
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").write_text("")
    assert main(["pack", "--latent-root", str(tmp_path / "pairs"), "--output-root", str(tmp_path / "file")]) == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert line.startswith("error: ")


def test_an_extraction_beside_the_others_can_be_packed_later(tmp_path, capsys):
    make_pairs(tmp_path / "pairs" / "wide", ["a"])
    assert pack(tmp_path) == 0
    make_pairs(tmp_path / "pairs" / "tall", ["a"])
    assert pack(tmp_path) == 0
    check_same(tmp_path)
    manifest = json.dumps(MANIFEST | {"settings": {"height": 64}})
    (tmp_path / "pairs" / "wide" / "manifest.json").write_text(manifest)  # made otherwise since
    assert pack(tmp_path) == 2
    assert "holds pairs made in another way" in capsys.readouterr().err


@needs.posix
def test_two_packs_do_not_write_at_once(packed, capsys):
    fcntl = needs.package("fcntl", "Python for Linux or macOS")
    descriptor = os.open(packed / "shards", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert pack(packed) == 2
    assert "another pack is writing there" in capsys.readouterr().err
    os.close(descriptor)
    assert pack(packed) == 0


@needs.posix
def test_a_killed_pack_leaves_nothing_that_the_next_one_does_not_clear(tmp_path):
    """Killed while it writes a shard."""
    z = torch.ones(16, 33, 60, 80)
    for i in range(5):
        write_pair(tmp_path / "pairs" / f"v{i}.safetensors.zst", Pair(z * i, z, None))
    argv = [sys.executable, "-m", "training", "pack"]
    argv += ["--latent-root", str(tmp_path / "pairs"), "--output-root", str(tmp_path / "shards")]

    def orphans():
        with suppress(FileNotFoundError):  # the command makes the folder and removes it again, to see whether it can
            return list((tmp_path / "shards").glob(".kvae-*"))
        return []

    for _ in range(5):  # on a busy machine it may be done before it is killed
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not orphans() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if orphans():
            break
        shutil.rmtree(tmp_path / "shards")
    assert orphans()
    assert subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert len(open_pairs(tmp_path / "shards")) == 5
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000.safetensors", "index.json"]
