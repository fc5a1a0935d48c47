"""The index of packed pictures: made once, never stale, never believed, small; and its samples."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import needs
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl import pack as packing
from kvae_comfyui.training.vfl import scan
from kvae_comfyui.training.vfl.index import Index
from kvae_comfyui.training.vfl.pictures import PictureError, read_picture
from kvae_comfyui.training.vfl.tars import entries
from vfl_pictures import make_folder, pack

needs.package("webdataset", "requirements-vfl.txt")
COUNTS = {"ash": 5, "brock": 2, "solo": 1}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Eight pictures in three shards, train only."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 500)
    make_folder(tmp_path / "in", COUNTS)
    assert pack(tmp_path / "in", tmp_path / "set", "--val-share", "0") == 0
    return tmp_path / "set"


def files(data) -> dict[bytes, str]:
    """The bytes of all pictures, with their identities."""
    return {path.read_bytes(): path.parent.name for path in (data.parent / "in").rglob("*.png")}


def test_samples_are_the_pictures(data):
    index, known = Index(data, "train"), files(data)
    assert index.identities == sorted(COUNTS) and index.counts.tolist() == [5, 2, 1]
    found = {}
    for k in range(200):
        sample = index.sample(3, k, read=bytes)
        assert known[sample.picture] == index.identities[sample.identity]
        found[sample.id] = sample.picture
    assert set(found.values()) == known.keys()
    assert torch.equal(index.sample(3, 0).picture, read_picture(index.sample(3, 0, read=bytes).picture))
    order = [e.id for path in sorted((data / "data/train").iterdir()) for e in entries(path)]
    mine = [index.at(0, i, bytes) for i in range(5)]
    assert [each.id for each in mine] == [key for key in order if key in {each.id for each in mine}]


def test_the_order_of_the_manifest_numbers_identities(data):
    path = data / "manifest/train_manifest.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *rows[::-1]]) + "\n")
    index, known = Index(data, "train"), files(data)
    assert index.identities == ["solo", "brock", "ash"] and index.counts.tolist() == [1, 2, 5]
    for k in range(50):
        sample = index.sample(0, k, read=bytes)
        assert known[sample.picture] == index.identities[sample.identity]


def test_the_secondary_is_another_picture_of_the_identity_or_none(data):
    index = Index(data, "train")
    pairs = Counter()
    for k in range(1500):
        sample = index.sample(1, k, 1.0, bytes)
        assert sample.secondary != sample.picture and (sample.secondary is None) == (sample.identity == 2)
        assert sample.picture == index.sample(1, k, 0.0, bytes).picture  # it does not change the primary
        if sample.identity == 0:
            pairs[sample.picture, sample.secondary] += 1
    assert len(pairs) == 20  # uniform among the others, whatever the primary
    expected = sum(pairs.values()) / 20
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 19 + 4 * 38**0.5
    found = sum(index.sample(1, k, 0.25, bytes).secondary is not None for k in range(1000))
    assert abs(found / 1000 - 0.25 * 2 / 3) < 4 * (0.14 / 1000) ** 0.5


def test_a_picture_that_cannot_be_read_is_named_and_another_is_taken(data):
    index = Index(data, "train")
    bad = {index.at(0, i, bytes).picture for i in (1, 3)}

    def read(file: bytes) -> bytes:
        if file in bad:
            raise PictureError("broken")
        return file

    counts, skipped = Counter(), 0
    for k in range(600):
        sample = index.sample(2, k, 0.5, read)
        assert not {sample.picture, sample.secondary} & bad
        plain = index.sample(2, k, 0.0, bytes)
        assert sample.identity == plain.identity and (sample.picture == plain.picture or plain.picture in bad)
        skipped += len(sample.skipped)
        assert all(text.endswith(": broken") for text in sample.skipped)
        counts[sample.identity] += sample.identity == 0 and sample.picture is not None
    assert skipped > 40 and abs(counts[0] / 600 - 1 / 3) < 0.08  # the identity is still as frequent
    bad |= set(files(data))
    with pytest.raises(UserError, match="none of the . pictures of '.*' can be read .*take this identity out"):
        index.sample(0, 0, read=read)


def test_samples_may_be_drawn_by_many_threads(data):
    index = Index(data, "train")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: index.sample(0, k).id, range(200)))
    assert found == [index.sample(0, k).id for k in range(200)]


def test_the_index_is_made_once(data, monkeypatch):
    Index(data, "train")
    monkeypatch.setattr(scan, "scan", None)
    Index(data, "train")


def test_changed_shards_are_indexed_anew(data):
    before = Index(data, "train")
    path = sorted((data / "data/train").iterdir())[1]
    other = path.with_name("train-000009.tar")
    path.rename(other)
    after = Index(data, "train")
    assert other in after.table.files and path not in after.table.files
    assert after.counts.tolist() == before.counts.tolist()
    assert {after.at(0, i, bytes).picture for i in range(5)} == {f for f, who in files(data).items() if who == "ash"}
    shutil.copy(other, path)  # twice now
    with pytest.raises(UserError, match=r"manifest.csv: \d pictures of '\w+', and \d in the shards; write it anew"):
        Index(data, "train")
    assert pack("", data) == 0
    assert Index(data, "train").counts.sum() > 8


@pytest.mark.parametrize("name", ["starts", "shard", "header", "lead", "size"])
@pytest.mark.parametrize("value", [-1, 1 << 30])
def test_an_index_that_came_with_the_shards_of_others_is_not_believed(data, name, value):
    """One that leads outside of its shards is made anew."""
    path = data / "index/train.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors[name][-1 if value > 0 else 0] = value
    save_file(tensors, path, metadata)
    table = scan._kept(path, *_of(data))
    assert table is None
    assert Index(data, "train").counts.tolist() == [5, 2, 1]
    assert scan._kept(path, *_of(data)) is not None


def _of(data):
    """The arguments by which an index is recognised."""
    paths = scan.shard_files(data, "train")
    return paths, {"key": "identity", "shards": [scan._stamp(each) for each in paths]}


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(100), b"\x80\x04\x95pickle"])
def test_a_damaged_index_is_made_anew(data, content):
    (data / "index/train.safetensors").write_bytes(content)
    assert Index(data, "train").counts.tolist() == [5, 2, 1]
    assert Weights(data / "index/train.safetensors").metadata["format"] == scan.FORMAT


def test_an_index_that_cannot_be_kept_is_made_each_time(data, capsys):
    shutil.rmtree(data / "index")
    (data / "index").write_text("in the way")
    assert Index(data, "train").counts.tolist() == [5, 2, 1]
    assert "the index is not kept, and the next run makes it again: " in capsys.readouterr().out


def test_what_is_missing_is_said(data, tmp_path):
    with pytest.raises(UserError, match=r"val_manifest.csv: no such manifest; write it by"):
        Index(data, "val")
    (data / "manifest/val_manifest.csv").write_text("identity,count\nash,1\n")
    with pytest.raises(UserError, match=r"no shards data/val/val-\*.tar in it; make them by"):
        Index(data, "val")
    path = data / "manifest/train_manifest.csv"
    path.write_text(path.read_text() + "misty,2\n")
    with pytest.raises(UserError, match="2 pictures of 'misty', and 0 in the shards; write it anew"):
        Index(data, "train")


def test_a_shard_that_shrinks_after_it_was_indexed_is_named(data):
    index = Index(data, "train")
    for path in index.table.files:
        os.truncate(path, 100)
    with pytest.raises(UserError, match=r"train-00000\d.tar: cut short since it was indexed; pack its pictures again"):
        index.sample(0, 0)


def test_a_picture_costs_twenty_bytes(tmp_path):
    """A million pictures of ten thousand identities; the index is mapped, and its rows are no objects."""
    n, identities, shards = 1_000_000, 10_000, 100
    counts = np.full(identities, n // identities)
    starts = np.concatenate([[0], np.cumsum(counts)])
    names = [f"{i:06d}" for i in range(identities)]
    paths = [tmp_path / "data/train" / f"train-{i:06d}.tar" for i in range(shards)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        path.touch()
        os.truncate(path, 1 << 40)  # with holes
    (tmp_path / "manifest").mkdir()
    rows = "".join(f"{name},{n // identities}\n" for name in names)
    (tmp_path / "manifest/train_manifest.csv").write_text("identity,count\n" + rows)
    places = np.arange(n, dtype=np.int64)
    arrays = {"shard": places % shards, "header": places * 1024, "lead": places * 0 + 512, "size": places * 0 + 300}
    arrays = {name: values.astype(scan.ARRAYS[name]) for name, values in arrays.items()}
    table = scan.Table(paths, names, starts, **arrays)
    about = {"key": "identity", "shards": [scan._stamp(path) for path in paths]}
    scan._keep(scan.index_path(tmp_path, "train"), table, about)
    assert scan.index_path(tmp_path, "train").stat().st_size < 21 * n
    index = Index(tmp_path, "train")
    assert sum(getattr(index.table, name).nbytes for name in scan.ARRAYS) == 20 * n
    assert len(index.counts) == identities and set(index.counts.tolist()) == {100}
    with pytest.raises(UserError, match=r"train-0000\d\d.tar: changed since it was indexed"):
        index.sample(0, 0)  # the shards are empty


def test_json_that_is_not_of_a_sample_is_named(data):
    from test_tars import sample, written

    path = data / "data/train/train-000009.tar"
    written(path, [*sample("x"), *sample("y", about=json.dumps({"name": 1}).encode())])
    with pytest.raises(UserError) as error:
        Index(data, "train")
    why = "no identity under 'identity' (its keys: name); name the right one by --identity-key"
    assert str(error.value) == f"{path}: y.json: {why}"
