"""Packing and unpacking lose and double no pair, whatever was deleted, damaged or killed."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch

import needs
from command import start
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.pairs import Pair, find_pairs, write_pair
from kvae_comfyui.training.errors import UserError
from packed_pairs import MANIFEST, check_same, make_packed, make_pairs, pack, shard_names, unpack

packed = pytest.fixture(make_packed)


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


def test_a_damaged_shard_is_named_and_the_advice_helps(packed, capsys):
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
    shard.unlink()  # or the copy
    assert pack(packed) == 0
    check_same(packed)


def test_shards_that_an_unfinished_pack_added_are_not_overlooked(packed):
    index = (packed / "shards" / "index.json").read_bytes()
    make_pairs(packed / "pairs", ["v9"])
    assert pack(packed) == 0
    (packed / "shards" / "index.json").write_bytes(index)  # as if killed just before it was written
    with pytest.raises(UserError, match=r"00003.safetensors: is not in index.json; pack again"):
        open_pairs(packed / "shards")
    assert pack(packed) == 0
    check_same(packed)


def test_unpacking_resumes_and_refuses_a_different_pair_of_the_same_name(packed, capsys):
    assert unpack(packed) == 0
    (packed / "unpacked" / "v4.safetensors.zst").unlink()
    capsys.readouterr()
    assert unpack(packed) == 0
    assert "1 pairs unpacked, 8 already there" in capsys.readouterr().out
    assert [path.read_bytes() for path in find_pairs(packed / "unpacked")] == [
        path.read_bytes() for path in find_pairs(packed / "pairs")
    ]
    z = torch.zeros(16, 5, 4, 6)
    write_pair(packed / "unpacked" / "v4.safetensors.zst", Pair(z, z, None))
    assert unpack(packed) == 2
    assert "v4.safetensors.zst: not the pair that the shards hold under this name" in capsys.readouterr().err


def test_pairs_and_shards_need_separate_folders(packed, capsys):
    for out in ("pairs", "pairs/shards", "."):
        assert pack(packed, out) == 2
        assert "one lies in the other" in capsys.readouterr().err
    make_pairs(packed / "shards", ["v9"])
    with pytest.raises(UserError, match="holds pairs and shards"):
        open_pairs(packed / "shards")


def test_a_refusal_leaves_no_files(tmp_path, capsys):
    make_pairs(tmp_path / "pairs", ["a"])
    (tmp_path / "pairs" / "b.safetensors.zst").write_bytes(b"no pair")
    assert pack(tmp_path) == 2
    assert not (tmp_path / "shards").exists()
    (tmp_path / "pairs" / "b.safetensors.zst").unlink()
    assert pack(tmp_path) == 0
    shard = tmp_path / "shards" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert unpack(tmp_path) == 2
    assert not (tmp_path / "unpacked").exists()
    (tmp_path / "file").write_text("")
    assert pack(tmp_path, "file") == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert line.startswith("error: ")


def test_another_extraction_can_be_packed_later(tmp_path, capsys):
    make_pairs(tmp_path / "pairs" / "wide", ["a"])
    assert pack(tmp_path) == 0
    make_pairs(tmp_path / "pairs" / "tall", ["a"])
    assert pack(tmp_path) == 0
    check_same(tmp_path)
    manifest = json.dumps(MANIFEST | {"settings": {"height": 64}})
    (tmp_path / "pairs" / "wide" / "manifest.json").write_text(manifest)  # made with other settings since
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
def test_the_next_pack_deletes_the_files_of_a_killed_pack(tmp_path):
    """The first pack is killed while it writes a shard."""
    z = torch.ones(16, 33, 60, 80)
    for i in range(5):
        write_pair(tmp_path / "pairs" / f"v{i}.safetensors.zst", Pair(z * i, z, None))
    argv = ["pack", "--latent-root", tmp_path / "pairs", "--output-root", tmp_path / "shards"]

    def orphans():
        with suppress(FileNotFoundError):  # the command makes the folder and removes it again, to see whether it can
            return list((tmp_path / "shards").glob(".kvae-*"))
        return []

    for _ in range(5):  # on a busy machine it may be done before it is killed
        process = start(*argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not orphans() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if orphans():
            break
        shutil.rmtree(tmp_path / "shards")
    assert orphans()
    assert start(*argv, stdout=subprocess.DEVNULL, stderr=None).wait() == 0
    assert len(open_pairs(tmp_path / "shards")) == 5
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000.safetensors", "index.json"]
