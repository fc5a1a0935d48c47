"""Pair files: the published format both ways, and every way to be broken named."""

import pytest
import torch
import zstandard
from safetensors.torch import load, save

from kvae_comfyui.training.dataset import open_pairs
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.pairs import Pair, Shape, Source, find_pairs, read_pair, read_shape, write_pair

SHAPE = (16, 3, 4, 6)
SOURCE = Source("a/b.avi", 12, 7, 2, 32, 48)


def pack(path, tensors):
    path.write_bytes(zstandard.ZstdCompressor().compress(save(tensors)))
    return path


def test_round_trip(tmp_path):
    pair = Pair(torch.randn(SHAPE), torch.randn(SHAPE), SOURCE)
    path = tmp_path / "class" / "clip.safetensors.zst"
    write_pair(path, pair)
    back = read_pair(path)
    assert back.source == SOURCE
    assert torch.equal(back.z_h, pair.z_h.half()) and torch.equal(back.z_k, pair.z_k.half())
    assert find_pairs(tmp_path) == [path]
    assert read_shape(path) == Shape(16, *SHAPE)


def test_a_published_reader_reads_ours(tmp_path):
    """zstd around safetensors with fp16 z_h and z_k of [C, T', H', W'], and nothing else to know."""
    path = tmp_path / "clip.safetensors.zst"
    write_pair(path, Pair(torch.ones(SHAPE), torch.zeros(SHAPE), SOURCE))
    tensors = load(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "z_h": (torch.float16, SHAPE),
        "z_k": (torch.float16, SHAPE),
    }


def test_we_read_published_ones(tmp_path):
    path = pack(tmp_path / "p.safetensors.zst", {"z_h": torch.ones(SHAPE).half(), "z_k": torch.zeros(SHAPE).half()})
    pair = read_pair(path)
    assert pair.source is None
    assert pair.z_h.sum() == torch.ones(SHAPE).sum()


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors.zst"
    z = torch.randn(SHAPE).half()
    good = pack(path, {"z_h": z, "z_k": z.clone()}).read_bytes()
    cases = {
        "has no z_k; expected z_h and z_k, found z_h": {"z_h": z},
        r"z_k is \[16, 3, 4, 5\]; expected two": {"z_h": z, "z_k": z[..., :5].contiguous()},
        "expected two .* of one grid": {"z_h": z[None], "z_k": z[None].clone()},
        "not finite": {"z_h": z, "z_k": z / 0},
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            read_pair(pack(path, tensors))
    for data, message in (
        (good[: len(good) // 2], "cut short or not zstd"),
        (b"not zstd at all", "cut short or not zstd"),
        (b"", "cut short or not zstd"),
        (zstandard.ZstdCompressor().compress(b"hello"), "holds no safetensors"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            read_pair(path)
        assert str(path) in str(error.value)
        if data != good[: len(data)] or not data:  # the shape is at the start, and nothing else is read for it
            with pytest.raises(UserError, match="cut short or not zstd"):
                read_shape(path)


def test_a_small_file_cannot_claim_all_memory(tmp_path):
    path = tmp_path / "bomb.safetensors.zst"
    bomb = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    chunk = bytes(2**20)
    path.write_bytes(b"".join([bomb.compress(chunk) for _ in range(1100)]) + bomb.flush())
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="cut short or not zstd|unpacks to more"):
        read_pair(path)


def test_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder; run `python -m training extract` first"):
        find_pairs(tmp_path / "absent")
    with pytest.raises(UserError, match="no .safetensors.zst files in it"):
        find_pairs(tmp_path)


def test_batches(tmp_path):
    paths = [tmp_path / f"{i}.safetensors.zst" for i in range(3)]
    for i, path in enumerate(paths):
        write_pair(path, Pair(torch.full(SHAPE, i), torch.full(SHAPE, -i), None))
    z_h, z_k = open_pairs(tmp_path).batch([2, 1], torch.device("cpu"))
    assert z_h.shape == (2, *SHAPE) and z_h.dtype == torch.float32
    assert z_h[:, 0, 0, 0, 0].tolist() == [2, 1] and z_k[:, 0, 0, 0, 0].tolist() == [-2, -1]
