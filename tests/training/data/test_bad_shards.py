"""Malformed or damaged shards and indexes are refused, and the error says what to do."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvae_comfyui.training.data import shards
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.errors import UserError
from packed_pairs import check_same, make_packed, pack, unpack

packed = pytest.fixture(make_packed)


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
def test_a_malformed_index_is_refused_and_packing_rebuilds_it(packed, text, capsys):
    (packed / "shards" / "index.json").write_text(text)
    with pytest.raises(UserError, match="not the index of packed pairs.*; pack them again"):
        open_pairs(packed / "shards")
    assert pack(packed) == 0  # which writes a new index
    check_same(packed)


def replace_in_shard(path, **tensors):
    held = load_file(path)
    save_file({name: t for name, t in (held | tensors).items() if t is not None}, path, {"format": shards.FORMAT})


CLIPS_OF_OTHERS = [
    "", "null", "{}", "[" * 100_000, "[1, 2, 3]", '["v0", "v1", "v2"]', '[{"clip": "v0"}, {"clip": "v1"}]',
    '[{"clip": "v0"}, {"clip": "v1"}, {"clip": 3}]', '[{"clip": "v0"}, {"clip": "v1"}, {"source": null}]',
]  # fmt: skip


@pytest.mark.parametrize("text", CLIPS_OF_OTHERS, ids=range(len(CLIPS_OF_OTHERS)))
def test_a_malformed_list_of_clips_is_refused(packed, text, capsys):
    """A list of fewer names than pairs would lose pairs."""
    shard = packed / "shards" / "00000.safetensors"
    replace_in_shard(shard, clips=torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8))
    for command in (unpack, pack):
        assert command(packed) == 2
        assert "does not say which clips it holds" in capsys.readouterr().err
    assert not (packed / "unpacked").exists()
    shard.unlink()
    assert pack(packed) == 0
    check_same(packed)


def test_malformed_sources_of_packed_clips_are_ignored(packed):
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
def test_a_shard_with_a_missing_or_wrong_tensor_is_refused(packed, capsys, tensors, words):
    replace_in_shard(packed / "shards" / "00000.safetensors", **tensors)
    assert pack(packed) == 2
    assert words in capsys.readouterr().err


def test_packed_values_that_are_not_finite_are_refused(packed):
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
    assert not (packed / "unpacked").exists()
