"""Pair files are written and read in the published format; an error names a broken file and its fault."""

import json
import os
from dataclasses import asdict
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load, save

import needs
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.dataset import open_pairs, video_of
from kvae_comfyui.training.data.manifests import read_spaces
from kvae_comfyui.training.data.pairs import (
    Pair,
    Shape,
    Source,
    find_pairs,
    lies_inside,
    read_header,
    read_pair,
    write_pair,
)
from kvae_comfyui.training.errors import UserError

SHAPE = (16, 3, 4, 6)
SOURCE = Source("a/b.avi", 12, 7, 2, 32, 48)


def pack(path, tensors):
    path.write_bytes(zstandard.ZstdCompressor().compress(save(tensors)))
    return path


def test_a_pair_survives_writing_and_reading(tmp_path):
    pair = Pair(torch.randn(SHAPE), torch.randn(SHAPE), SOURCE)
    path = tmp_path / "class" / "clip.safetensors.zst"
    write_pair(path, pair)
    back = read_pair(path)
    assert back.source == SOURCE
    assert torch.equal(back.z_h, pair.z_h.half()) and torch.equal(back.z_k, pair.z_k.half())
    assert find_pairs(tmp_path) == [path]
    assert read_header(path) == (Shape(16, *SHAPE), SOURCE)


def test_a_pair_file_has_the_published_format(tmp_path):
    """zstd around safetensors with float16 z_h and z_k of [C, T', H', W']."""
    path = tmp_path / "clip.safetensors.zst"
    write_pair(path, Pair(torch.ones(SHAPE), torch.zeros(SHAPE), SOURCE))
    tensors = load(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "z_h": (torch.float16, SHAPE),
        "z_k": (torch.float16, SHAPE),
    }


def test_published_pairs_are_read(tmp_path):
    path = pack(tmp_path / "p.safetensors.zst", {"z_h": torch.ones(SHAPE).half(), "z_k": torch.zeros(SHAPE).half()})
    pair = read_pair(path)
    assert pair.source is None
    assert pair.z_h.sum() == torch.ones(SHAPE).sum()


def test_broken_pair_files_are_named(tmp_path):
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
        (zstandard.ZstdCompressor().compress(b"hello"), "around safetensors"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            read_pair(path)
        assert str(path) in str(error.value)
        if data != good[: len(data)] or not data:  # the header is at the start, and nothing else is read
            with pytest.raises(UserError, match="cut short or not zstd"):
                read_header(path)


def test_a_small_file_cannot_claim_all_memory(tmp_path):
    path = tmp_path / "bomb.safetensors.zst"
    bomb = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    chunk = bytes(2**20)
    path.write_bytes(b"".join([bomb.compress(chunk) for _ in range(1100)]) + bomb.flush())
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="cut short or not zstd|unpacks to more"):
        read_pair(path)


def test_folders_without_pairs_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder; run `python -m training extract` first"):
        find_pairs(tmp_path / "absent")
    with pytest.raises(UserError, match="no .safetensors.zst files in it"):
        find_pairs(tmp_path)


def test_a_batch_holds_the_pairs_in_order(tmp_path):
    paths = [tmp_path / f"{i}.safetensors.zst" for i in range(3)]
    for i, path in enumerate(paths):
        write_pair(path, Pair(torch.full(SHAPE, i), torch.full(SHAPE, -i), None))
    z_h, z_k = open_pairs(tmp_path).batch([2, 1], torch.device("cpu"))
    assert z_h.shape == (2, *SHAPE) and z_h.dtype == torch.float32
    assert z_h[:, 0, 0, 0, 0].tolist() == [2, 1] and z_k[:, 0, 0, 0, 0].tolist() == [-2, -1]


def test_values_that_are_not_finite_in_float16_are_neither_written_nor_read(tmp_path):
    """Finite in float32 is not enough: float16 ends at 65,504."""
    path, z = tmp_path / "x.safetensors.zst", torch.randn(SHAPE)
    for bad in (7e4, float("inf"), float("nan")):
        wrong = z.clone()
        wrong[0, 0, 0, 0] = bad
        for pair in (Pair(wrong, z, None), Pair(z, wrong, None)):
            with pytest.raises(UserError, match="not finite numbers in float16; not written"):
                write_pair(path, pair)
            assert not path.exists()
            with pytest.raises(UserError, match="not finite numbers in float16; delete it and extract again"):
                read_pair(pack(tmp_path / "y.safetensors.zst", {"z_h": pair.z_h, "z_k": pair.z_k}))
    with pytest.raises(UserError, match="expected float16"):
        read_pair(pack(path, {"z_h": z.int(), "z_k": z.int()}))


def test_a_pair_may_consist_of_several_zstandard_frames(tmp_path):
    """As `pzstd` writes them; with a skippable frame in front, and an empty frame between two others."""
    data = save({"z_h": torch.ones(SHAPE).half(), "z_k": torch.zeros(SHAPE).half()})
    compress = zstandard.ZstdCompressor().compress
    path = tmp_path / "x.safetensors.zst"
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    path.write_bytes(skipped + compress(data[:100]) + compress(b"") + compress(data[100:]))
    assert read_pair(path).z_h.sum() == torch.ones(SHAPE).sum()
    assert read_header(path) == (Shape(16, *SHAPE), None)


NUMBERS = ("first", "frames", "padded", "height", "width")
WRONG = [
    *({"video": video} for video in ("/etc/passwd", "../../a.avi", "a/../../b.avi", "", None)),
    *({key: number} for key in NUMBERS for number in (-1, 10**30, "7", 1.5, True)),
]
SOURCES_OF_OTHERS = [
    "null", "[]", "3", '"a.avi"', "{", "[" * 100_000, '{"video": "a.avi"}',
    *(json.dumps(asdict(SOURCE) | wrong) for wrong in WRONG),
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES_OF_OTHERS, ids=range(len(SOURCES_OF_OTHERS)))
def test_a_malformed_source_is_ignored(tmp_path, source):
    z = torch.ones(SHAPE).half()
    path = tmp_path / "x.safetensors.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(save({"z_h": z, "z_k": z.clone()}, {"source": source})))
    assert read_pair(path).source is None
    assert read_header(path) == (Shape(16, *SHAPE), None)


def test_a_source_of_a_newer_version_is_read(tmp_path):
    z = torch.ones(SHAPE).half()
    path = tmp_path / "x.safetensors.zst"
    source = json.dumps(asdict(SOURCE) | {"turned": 90})
    path.write_bytes(zstandard.ZstdCompressor().compress(save({"z_h": z, "z_k": z.clone()}, {"source": source})))
    assert read_pair(path).source == read_header(path)[1] == SOURCE


def test_names_that_stay_in_their_folder():
    for name in ("a.mp4", "a/b.mp4", "..a/b..mp4", "a\\b.mp4", "C: drive.mp4"):
        assert lies_inside(name, PurePosixPath)
    for name in ("", "/", "/a.mp4", "..", "a/../../b"):
        assert not lies_inside(name, PurePosixPath)
    for name in ("..\\..\\a", "C:\\a", "C:a", "\\a", "\\\\server\\share\\a", "a/../../b"):
        assert not lies_inside(name, PureWindowsPath)


def test_links_are_followed_and_loops_are_not(tmp_path):
    """No folder is searched twice: a link to a folder inside the root adds no pairs."""
    root, elsewhere = tmp_path / "pairs", tmp_path / "other disk"
    for folder in (root / "a", root / "b", elsewhere / "deep"):
        write_pair(folder / "clip.safetensors.zst", Pair(torch.ones(SHAPE), torch.ones(SHAPE), None))
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "deep")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "beside").symlink_to(root / "b")
    (elsewhere / "back").symlink_to(tmp_path)
    (root / "file.safetensors.zst").symlink_to(root / "a" / "clip.safetensors.zst")
    found = [path.relative_to(root).as_posix().removesuffix(".safetensors.zst") for path in find_pairs(root)]
    assert found == ["a/clip", "again/clip", "b/clip", "file"]
    assert len({path.resolve() for path in find_pairs(root)}) == 3


@needs.posix
def test_a_pipe_among_pairs_is_refused_without_waiting(tmp_path, capsys):
    write_pair(tmp_path / "pairs" / "a.safetensors.zst", Pair(torch.ones(SHAPE), torch.ones(SHAPE), None))
    os.mkfifo(tmp_path / "pairs" / "b.safetensors.zst")
    for argv in (["train"], ["pack", "--output-root", str(tmp_path / "out")]):
        assert main([*argv, "--latent-root", str(tmp_path / "pairs")]) == 2
        assert "pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said", "video"),
    [
        ("a/b", None, "a/b"),
        ("a/b.003", None, "a/b"),
        ("a/b.003.mirrored", None, "a/b"),
        ("a/b.mirrored", None, "a/b"),
        ("Screen Recording 2026-01-05 at 10.16.30", None, "Screen Recording 2026-01-05 at 10.16.30"),
        ("scene.0000a", None, "scene.0000a"),
        ("clip.1080p", None, "clip.1080p"),
        ("clip.000.003", None, "clip.000"),
        ("wide/a/b.003", None, "a/b"),
        ("wide/c.003", "a/b.avi", "a/b.avi"),
    ],
)
def test_the_video_of_a_clip_is_its_path(name, said, video):
    assert video_of(name, said, ["wide", "tall"]) == video


def test_no_video_is_in_both_halves(tmp_path):
    """Five clips of one video and one of each of four others: no video is on both sides."""
    z = torch.ones(SHAPE)
    for video, clips in (("a", 5), ("b", 1), ("c", 1), ("d.x", 1), ("d.y", 1)):
        for i in range(clips):
            source = Source(f"{video}.avi", 9 * i, 9, 0, 32, 48)
            write_pair(tmp_path / f"{video}.{i:03d}.safetensors.zst", Pair(z, z, source))
    pairs = open_pairs(tmp_path)
    assert len(np.unique(pairs.videos())) == 5
    assert pairs.halves().tolist() == [False] * 5 + [True] * 4
    with pytest.raises(UserError, match="one video only"):
        pairs.take(np.arange(5)).halves()


def test_pairs_with_names_of_another_encoding_have_digests(tmp_path):
    name = b"caf\xe9.safetensors.zst".decode(errors="surrogateescape")
    source = Source(b"caf\xe9.mp4".decode(errors="surrogateescape"), 0, 9, 0, 32, 48)
    try:
        write_pair(tmp_path / name, Pair(torch.ones(SHAPE), torch.ones(SHAPE), source))
    except WeightsError:
        pytest.skip("needs a file system that accepts any bytes in names, such as ext4")
    pairs = open_pairs(tmp_path)
    assert read_pair(tmp_path / name).source == source
    assert len(pairs.digest()) == len(pairs.fingerprint()) == 64 and len(pairs.videos()) == 1


MANIFESTS_OF_OTHERS = [
    "", "{", "[]", "null", "[" * 100_000, '{"settings": {}}', '{"settings": {}, "hunyuan_vae": null, "kvae": {}}',
    '{"settings": [], "hunyuan_vae": {"space": "a", "sha256": "b"}, "kvae": {"space": "a", "sha256": "b"}}',
    '{"settings": {}, "hunyuan_vae": {"space": "a"}, "kvae": {"space": "a"}}',
    '{"settings": {}, "hunyuan_vae": {"space": 1, "sha256": "b"}, "kvae": {"space": "a", "sha256": "b"}}',
]  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS_OF_OTHERS, ids=range(len(MANIFESTS_OF_OTHERS)))
def test_a_malformed_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not the manifest of an extraction"):
        read_spaces(tmp_path)


def test_a_pair_with_a_changed_bit_is_refused(tmp_path):
    """zstd's checksum ensures that a reader gets the latents that were written, or none."""
    path, rng = tmp_path / "a.safetensors.zst", np.random.default_rng(0)
    good = Pair(torch.randn(16, 3, 4, 4).half(), torch.randn(16, 3, 4, 4).half(), None)
    write_pair(path, good)
    data, refused = path.read_bytes(), 0
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            found = read_pair(path)
        except UserError:
            refused += 1
        else:
            assert torch.equal(found.z_h, good.z_h) and torch.equal(found.z_k, good.z_k)
    assert refused > 290
