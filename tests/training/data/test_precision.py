"""The precision of an extraction: chosen by a clip where bfloat16 is tried, and one for all pairs of a folder."""

import json
import threading

import pytest
import torch

import needs
from conftest import make_videos
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data import encoding, precision
from kvae_comfyui.training.data.pairs import find_pairs, read_pair
from kvae_comfyui.training.data.precision import bfloat16_errors, precision_of
from kvae_comfyui.training.data.transfer import to_device, to_host
from kvae_comfyui.training.vaes import load_hunyuan_vae, load_kvae_for_training

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def extract(folder, *more, out="latents"):
    size = ["--num-frames", "9", "--height", "32", "--width", "32", "--device", "cpu"]
    return main(["extract", "--videos-root", str(folder / "videos"), "--output-root", str(folder / out), *size, *more])


def dtype_of(folder, out="latents"):
    return json.loads((folder / out / "manifest.json").read_text())["settings"]["dtype"]


def variance_share(one, other):
    return ((one.float() - other.float()).square().mean() / one.float().var()).item()


def test_a_folder_keeps_its_precision_and_only_cuda_tries_bfloat16():
    assert precision_of("auto", {}, CPU) == precision_of("auto", {}, torch.device("mps")) == "float32"
    assert precision_of("auto", {}, CUDA) == "auto"
    for device in (CPU, CUDA):
        assert precision_of("float16", {"dtype": "bfloat16"}, device) == "float16"
        assert precision_of("auto", {"dtype": "bfloat16"}, device) == "bfloat16"
        assert precision_of("auto", {"dtype": "float32"}, device) == "float32"
        assert precision_of("auto", {"dtype": []}, device) == precision_of("auto", {"fit": "crop"}, device) == "float32"


def test_on_a_cpu_nothing_is_tried(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=9, height=32, width=32)
    assert extract(tmp_path) == 0
    assert dtype_of(tmp_path) == "float32" and "--dtype" not in capsys.readouterr().out


@pytest.fixture
def tried(monkeypatch):
    """bfloat16 is tried on a CPU, too."""
    monkeypatch.setattr(precision, "DEVICES", ("cpu",))


def test_bfloat16_is_used_if_it_changes_latents_little(tmp_path, capsys, tried):
    make_videos(tmp_path / "videos", 2, frames=9, height=32, width=32)
    (tmp_path / "videos" / "a.mp4").write_text("no video")  # the first clip that can be read decides
    assert extract(tmp_path) == 1
    out = capsys.readouterr().out
    assert "--dtype bfloat16: bfloat16 changes the first clip's latents by 0.0" in out
    assert "(hunyuan_video), 0.0" in out and "(kvae_3d_1.0)" in out
    assert dtype_of(tmp_path) == "bfloat16"
    assert extract(tmp_path, "--dtype", "bfloat16", out="asked") == extract(tmp_path, "--dtype", "float32", out="exact")
    for found, asked, exact in zip(
        *(find_pairs(tmp_path / each) for each in ("latents", "asked", "exact")), strict=True
    ):
        for name in ("z_h", "z_k"):
            found_z, asked_z, exact_z = (getattr(read_pair(each), name) for each in (found, asked, exact))
            assert torch.equal(found_z, asked_z)
            assert 0 < variance_share(exact_z, found_z) < 0.01


def test_float32_is_used_if_bfloat16_changes_latents_much(tmp_path, capsys, tried, monkeypatch):
    monkeypatch.setattr(precision, "MOST_ERROR", 1e-9)
    make_videos(tmp_path / "videos", 1, frames=9, height=32, width=32)
    assert extract(tmp_path) == extract(tmp_path, "--dtype", "float32", out="exact") == 0
    assert "--dtype float32: bfloat16 changes the first clip's latents by 0.0" in capsys.readouterr().out
    assert dtype_of(tmp_path) == "float32"
    found, exact = (read_pair(find_pairs(tmp_path / each)[0]) for each in ("latents", "exact"))
    assert torch.equal(found.z_h, exact.z_h) and torch.equal(found.z_k, exact.z_k)  # not of rounded weights


def test_float32_is_used_if_no_clip_can_decide(tmp_path, capsys, tried):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_text("no video")
    assert extract(tmp_path) == 2
    captured = capsys.readouterr()
    assert "--dtype float32: bfloat16 changes the first clip's latents by an unknown amount" in captured.out
    assert "none of the 1 videos gave a pair" in captured.err


def test_an_interrupted_extraction_goes_on_in_its_precision(tmp_path, capsys, tried, monkeypatch):
    """Also where the choice would now be another one; pairs of two precisions are refused."""
    make_videos(tmp_path / "videos", 2, frames=9, height=32, width=32)
    assert extract(tmp_path, "--max-clips", "1") == 0
    monkeypatch.setattr(precision, "DEVICES", ())
    assert extract(tmp_path) == 0
    assert "1 pairs extracted, 1 already there" in capsys.readouterr().out
    assert dtype_of(tmp_path) == "bfloat16"
    assert extract(tmp_path, "--dtype", "float32") == 2
    assert "holds pairs made with other settings" in capsys.readouterr().err


def test_errors_are_shares_of_the_variance():
    vaes = load_hunyuan_vae("tiny", "cpu"), load_kvae_for_training("tiny", "cpu")
    frames = torch.randint(256, (1, 3, 9, 64, 64), dtype=torch.uint8)
    exact = [vae.encode(frames) for vae in vaes]
    signatures = [vae.signature for vae in vaes]
    errors = bfloat16_errors(frames, vaes)
    for vae, z, signature in zip(vaes, exact, signatures, strict=True):
        assert errors[vae.space.name] == pytest.approx(variance_share(z, vae.encode(frames)), rel=1e-4)
        assert 1e-6 < errors[vae.space.name] < 1e-3 and vae.signature == signature


def test_the_next_clips_are_encoded_before_the_last_latents_are_fetched(tmp_path, monkeypatch):
    """With a GPU, encoding only gives it work to do."""
    make_videos(tmp_path / "videos", 3, frames=9, height=32, width=32)
    encoded: list[threading.Event] = []
    waited_in_vain = []

    def slow(tensors):
        number, latents = len(encoded), to_host(tensors)
        encoded.append(threading.Event())
        if number:
            encoded[number - 1].set()

        def fetch():
            if number < 2 and not encoded[number].wait(20):  # until the next clip has been encoded
                waited_in_vain.append(number)
            return latents()

        return fetch

    monkeypatch.setattr(encoding, "to_host", slow)
    assert extract(tmp_path) == 0
    assert len(encoded) == 3 and not waited_in_vain


@needs.gpu
def test_transfers_keep_values_and_do_not_wait():
    x = torch.randint(256, (4, 3, 9, 64, 64), dtype=torch.uint8)
    moved = to_device(x, CUDA)
    fetch = to_host([moved, moved.float() / 3])
    del moved
    torch.full((64 << 20,), 7.0, device="cuda")  # may take the memory that was freed
    same, third = fetch()
    assert torch.equal(same, x) and torch.equal(third, x.float() / 3) and same.is_pinned()
