"""Packed pairs equal the unpacked pairs; crops of them teach an adapter what whole clips teach."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import needs
from kvae_comfyui.adapters.networks import Residual
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data import crops, packing, shards
from kvae_comfyui.training.data.crops import crop_shape, crop_weights, random_crop
from kvae_comfyui.training.data.dataset import batches, open_pairs
from kvae_comfyui.training.data.manifests import read_manifest
from kvae_comfyui.training.data.pairs import Pair, Shape, Source, find_pairs, read_pair, write_pair
from kvae_comfyui.training.errors import UserError
from packed_pairs import pack, unpack

CPU = torch.device("cpu")


def make_pairs(folder, count=6, grid=(3, 4, 6)):
    """Write pairs: every third has another grid, and the second has no source."""
    for i in range(count):
        t, h, w = grid if i % 3 else (grid[0] + 1, *grid[1:])
        z_h, z_k = torch.randn(16, t, h, w), torch.randn(8, t, h, w)
        source = None if i == 1 else Source(f"class/v{i}.avi", 3 * i, 4 * t - 3, 0, 8 * h, 8 * w)
        write_pair(folder / "class" / f"v{i}.000.safetensors.zst", Pair(z_h, z_k, source))
    manifest = {"settings": {}, "hunyuan_vae": {"space": "a", "sha256": "1"}, "kvae": {"space": "b", "sha256": "2"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unpacking_restores_the_same_files(tmp_path, monkeypatch):
    root = make_pairs(tmp_path / "pairs")
    monkeypatch.setattr(packing, "SHARD_BYTES", 8_000)  # two or three pairs
    assert pack(tmp_path) == 0
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert unpack(tmp_path) == 0
    assert contents(tmp_path / "unpacked") == contents(root)


def test_several_extractions_are_packed_together(tmp_path):
    """Two sizes of the same videos, each with its own manifest."""
    small, large = (make_pairs(tmp_path / "pairs" / size) for size in ("small", "large"))
    (small / "manifest.json").write_text((large / "manifest.json").read_text().replace("{}", '{"height": 64}', 1))
    assert pack(tmp_path) == 0
    assert unpack(tmp_path) == 0
    assert contents(tmp_path / "unpacked") == contents(tmp_path / "pairs")
    for root in (tmp_path / "pairs", tmp_path / "shards"):
        assert read_manifest(root)["settings"] == {"large": {}, "small": {"height": 64}}
        assert len(open_pairs(root)) == 12
        assert len(np.unique(open_pairs(root).videos())) == 6  # each video is in both
    (small / "manifest.json").write_text((large / "manifest.json").read_text().replace('"b"', '"c"'))
    with pytest.raises(UserError, match="large and small hold pairs of different VAEs .kvae: .*'b'.*'c'"):
        read_manifest(tmp_path / "pairs")


def test_packed_pairs_equal_the_files(tmp_path):
    files = open_pairs(make_pairs(tmp_path / "pairs"))
    assert pack(tmp_path) == 0
    packed = open_pairs(tmp_path / "shards")
    assert (
        sorted(map(packed.name, range(6))) == [files.name(i) for i in range(6)] == [f"class/v{i}.000" for i in range(6)]
    )
    assert len(np.unique(packed.videos())) == 6 and set(packed.videos()) == set(files.videos())
    for i in range(6):
        j = [files.name(n) for n in range(6)].index(packed.name(i))
        a, b = packed[i], files[j]
        assert torch.equal(a.z_h, b.z_h) and torch.equal(a.z_k, b.z_k) and a.source == b.source
        assert packed.shape(i) == files.shape(j) == Shape(16, *b.z_k.shape)
        where = slice(1, 3), slice(0, 2), slice(2, 5)
        z_h, z_k = packed.store.crop(i, where, where)
        assert torch.equal(z_h, b.z_h[:, 1:3, 0:2, 2:5]) and torch.equal(z_k, b.z_k[:, 1:3, 0:2, 2:5])


def test_the_index_has_mean_and_deviation_of_each_channel(tmp_path):
    root = make_pairs(tmp_path / "pairs")
    assert pack(tmp_path) == 0
    values = torch.cat([read_pair(path).z_h.flatten(1) for path in find_pairs(root)], 1).double()
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["pairs"] == 6
    torch.testing.assert_close(torch.tensor(index["statistics"]["z_h"]["mean"]).double(), values.mean(1))
    torch.testing.assert_close(torch.tensor(index["statistics"]["z_h"]["std"]).double(), values.std(1, correction=0))


def test_packing_resumes_and_adds_new_pairs(tmp_path, monkeypatch, capsys):
    root = make_pairs(tmp_path / "pairs")
    monkeypatch.setattr(packing, "SHARD_BYTES", 8_000)
    last = root / "class" / "v5.000.safetensors.zst"
    good = last.read_bytes()
    last.write_bytes(b"no pair")  # this ends the run after the shards before it are written
    assert pack(tmp_path) == 2
    with pytest.raises(UserError, match="no index.json in it"):
        open_pairs(tmp_path / "shards")
    last.write_bytes(good)
    before = contents(tmp_path / "shards")
    assert len([name for name in before if name.endswith(".safetensors")]) >= 2
    assert pack(tmp_path) == 0
    write_pair(root / "new.safetensors.zst", Pair(torch.randn(16, 3, 4, 6), torch.randn(8, 3, 4, 6), None))
    assert pack(tmp_path) == 0
    assert "1 pairs packed, 6 already there" in capsys.readouterr().out
    after = contents(tmp_path / "shards")
    assert all(after[name] == data for name, data in before.items())
    packed = open_pairs(tmp_path / "shards")
    assert sorted(map(packed.name, range(7))) == [*(f"class/v{i}.000" for i in range(6)), "new"]


@needs.linux
def test_reading_crops_keeps_no_clip_in_memory(tmp_path):
    z = torch.ones(16, 16, 32, 32).half()
    for number in range(4):
        clips = [{"clip": f"{number}/{i}", "source": None} for i in range(16)]
        shards.write_shard(tmp_path / f"{number:05d}.safetensors", clips, [Pair(z, z, None)] * 16)
    entries = [
        {"file": f"{n:05d}.safetensors", "pairs": 16, "z_h": list(z.shape), "z_k": list(z.shape)} for n in range(4)
    ]
    (tmp_path / "index.json").write_text(json.dumps({"format": shards.FORMAT, "statistics": {}, "shards": entries}))
    pairs = open_pairs(tmp_path)

    def held():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    (group,) = pairs.groups(1).values()
    pairs.crops(group[:1], 1, 0, 0, CPU)
    before = held()
    for i in group:
        z_h, _, _ = pairs.crops([i], 1, 0, 0, CPU)
        assert (z_h == 1).all()
    assert held() - before < 8 * 2**20  # of the 64 MiB read


def test_damaged_shards_and_missing_manifests_are_refused(tmp_path, capsys):
    root = make_pairs(tmp_path / "pairs")
    out = tmp_path / "shards"
    assert pack(tmp_path) == 0
    (shard, *_) = sorted(out.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="missing or damaged"):
        open_pairs(out)[0]
    shard.write_bytes(data)
    save_file({"z_h": torch.zeros(9, 16, 1, 1, 1).half(), "z_k": torch.zeros(9, 8, 1, 1, 1).half()}, shard)
    with pytest.raises(UserError, match="not as index.json says"):
        open_pairs(out)[0]
    (out / "index.json").write_text("[]")
    with pytest.raises(UserError, match="not the index of packed pairs"):
        open_pairs(out)
    (root / "manifest.json").unlink()
    capsys.readouterr()
    assert pack(tmp_path) == 2
    assert "holds pairs made in another way" in capsys.readouterr().err
    assert unpack(tmp_path, shards="pairs") == 2
    assert "no index.json in it" in capsys.readouterr().err


def test_a_shard_cannot_write_outside_of_the_folder(tmp_path, capsys):
    z = torch.zeros(16, 3, 4, 6).half()
    for name in ("../../escaped", str(tmp_path / "escaped")):
        out = tmp_path / "shards"
        shards.write_shard(out / "00000.safetensors", [{"clip": name, "source": None}], [Pair(z, z.clone(), None)])
        entry = {"file": "00000.safetensors", "pairs": 1, "z_h": list(z.shape), "z_k": list(z.shape)}
        (out / "index.json").write_text(json.dumps({"format": shards.FORMAT, "statistics": {}, "shards": [entry]}))
        assert unpack(tmp_path, "a/b") == 2
        assert "points outside --output-root; the shard is corrupt or malicious" in capsys.readouterr().err
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("grid", [(14, 20, 9), (4, 13, 30)])
def test_a_crop_gives_the_output_of_the_whole_clip_where_it_counts(grid, monkeypatch):
    monkeypatch.setattr(crops, "COUNTED", (2, 4, 3))
    network = Residual(4, 4, width=8, blocks=1)
    torch.nn.init.normal_(network.conv_out.weight)
    z = torch.randn(1, 4, *grid)
    rng = np.random.default_rng(0)
    seen, differs = torch.zeros(grid), False
    with torch.no_grad():
        whole = network(z)
        for _ in range(60):
            crop = random_crop(grid, network.radius, rng)
            part = (..., *crop.read)
            found, weight = network(z[part]), crop_weights([crop])
            assert found.shape[2:] == crop_shape(grid, network.radius) == weight.shape[2:]
            assert weight.sum() == pytest.approx(1)
            counts = weight[0, 0] > 0
            torch.testing.assert_close(found[0, :, counts], whole[part][0, :, counts], rtol=1e-4, atol=1e-5)
            differs |= not torch.allclose(found[0, :, ~counts], whole[part][0, :, ~counts], rtol=1e-2, atol=1e-2)
    assert differs  # the halo is needed
    for _ in range(3000):
        crop = random_crop(grid, network.radius, rng)
        seen[crop.read][crop.counted] += 1
    assert seen.min() > 0  # no position is left out


def test_an_epoch_uses_every_pair_once_and_resumes_anywhere(tmp_path):
    pairs = open_pairs(make_pairs(tmp_path, count=20))
    groups = pairs.groups(None)
    assert sorted(map(len, groups.values())) == [7, 13]
    order = list(batches(groups, 4, seed=1, epoch=2))
    assert sorted(np.concatenate(order).tolist()) == list(range(20))
    assert all(len({pairs.shape(i) for i in numbers}) == 1 for numbers in order)
    rest = list(batches(groups, 4, seed=1, epoch=2, start=3))
    assert [list(a) for a in rest] == [list(a) for a in islice(order, 3, None)]
    assert [list(a) for a in batches(groups, 4, seed=1, epoch=3)] != [list(a) for a in order]
    z_h, z_k, weight = pairs.crops(order[0], 1, 1, 2, CPU)
    again = pairs.crops(order[0], 1, 1, 2, CPU)
    assert torch.equal(z_h, again[0]) and z_h.dtype == torch.float32 and len(z_k) == len(weight) == len(order[0])


def test_training_from_shards_equals_training_from_files(tmp_path):
    for i in range(6):
        z = torch.randn(16, 3, 12, 14)
        write_pair(tmp_path / "pairs" / f"v{i}.safetensors.zst", Pair(z, z.flip(0) ** 2, None))
    assert pack(tmp_path) == 0
    logs = []
    for root in ("pairs", "shards"):
        out = tmp_path / f"from {root}"
        argv = ["train", "--latent-root", str(tmp_path / root), "--epochs", "2", "--batch-size", "4", "--device", "cpu"]
        assert main([*argv, "--out-h2k", str(out / "h.safetensors"), "--out-k2h", str(out / "k.safetensors")]) == 0
        logs.append([json.loads(line)["step"] for line in (out / "train.jsonl").read_text().splitlines()])
        logs[-1].append((out / "h.safetensors").read_bytes()[-10_000:])
    assert logs[0] == logs[1]
