"""Several processes train and extract as one does, and a killed run loses only the steps since its last save."""

import json
import time
from pathlib import Path

import psutil
import pytest
import torch

import needs
from command import launch
from conftest import make_videos
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.serving.latent_writers import save_latent
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import Pair, find_pairs, read_pair, write_pair
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.runtime.processes import Processes

pytestmark = needs.posix


def run(*argv, **how):
    process = launch(*argv, **how)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("2 processes, on cpu") == 1
    return out


@pytest.fixture
def latents(tmp_path_factory):
    """11 pairs of two grids: batches of 4 leave uneven batches, and one smaller than the number of processes."""
    root = tmp_path_factory.mktemp("latents")
    for i in range(11):
        z = torch.randn(16, 3, 12, 14 if i < 5 else 16)
        write_pair(root / f"v{i:02d}.safetensors.zst", Pair(z, z.flip(0) ** 2, None))
    return root


def train(latents, out, *more):
    return [
        *("train", "--latent-root", str(latents), "--val-latent-root", str(latents), "--batch-size", "4"),
        *("--out-h2k", str(out / "h.safetensors"), "--out-k2h", str(out / "k.safetensors"), "--device", "cpu", *more),
        *("--ema", "0", "--lr", "1e-2"),
    ]


def curve(out):
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows]


def test_two_processes_train_as_one_does(tmp_path, latents):
    """Even though each process draws different random numbers."""
    assert main(train(latents, tmp_path / "one", "--epochs", "3")) == 0
    argv = train(latents, tmp_path / "two", "--epochs", "3")
    out = run(
        *argv, program=[str(Path(__file__).with_name("two_ranks.py"))], ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2"
    )
    assert out.count("Training on 11 latent pairs") == 1
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 7
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    h, k = (load_adapter(tmp_path / name / "h.safetensors").state_dict() for name in ("one", "two"))
    for key in h:
        torch.testing.assert_close(h[key], k[key], rtol=1e-3, atol=1e-4)
    assert abs(one[-1]["val_k2h"] / one[0]["val_k2h"] - 1) > 1e-3  # steps are large enough to distinguish curves
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in (0, 1))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_mixed_precision_follows_the_curve_of_float32(tmp_path, latents):
    assert main(train(latents, tmp_path / "float32", "--epochs", "1")) == 0
    run(*train(latents, tmp_path / "bf16", "--epochs", "1"), ACCELERATE_MIXED_PRECISION="bf16")
    exact, rounded = curve(tmp_path / "float32")[-1], curve(tmp_path / "bf16")[-1]
    assert rounded == pytest.approx(exact, rel=1e-2) and rounded != exact


def test_one_process_of_accelerate_says_so(capsys, monkeypatch):
    """Without several GPUs, accelerate's launcher starts one process, even if more are asked for."""
    Processes("cpu")
    assert not capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert Processes("cpu").count == 1
    assert "accelerate launch started one process" in capsys.readouterr().out


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes for 2 GPUs; start one process for each GPU, or use --device cpu"):
        Processes("cuda")


def test_a_killed_training_ends_where_an_unkilled_one_does(tmp_path, latents, capsys):
    """Killed with two processes and resumed with one, it loses no saved step and repeats none."""
    options = ["--epochs", "6"]
    assert main(train(latents, tmp_path / "whole", *options)) == 0
    process = launch(*train(latents, tmp_path / "parts", "--epochs", "6"))
    state = tmp_path / "parts" / "h.resume.safetensors"
    deadline = time.time() + 200
    while not state.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()
    process.communicate()
    assert state.exists() and not (tmp_path / "parts" / "h.safetensors").exists()
    assert main(train(latents, tmp_path / "parts", *options)) == 0
    assert "Going on from step" in capsys.readouterr().out
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert [row["step"] for row in parts] == [row["step"] for row in whole]
    for a, b in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, rel=1e-3)


def test_processes_share_an_extraction_and_any_number_of_them_resumes_it(tmp_path, capsys):
    make_videos(tmp_path / "videos", 8, frames=9, height=32, width=32)
    argv = ["extract", "--videos-root", str(tmp_path / "videos"), "--output-root", str(tmp_path / "latents")]
    argv += ["--num-frames", "9", "--height", "32", "--width", "32", "--device", "cpu"]
    out = run(*argv)
    assert out.count("pairs extracted") == 1 and "8 pairs extracted, 0 already there, 0 skipped" in out
    paths = find_pairs(tmp_path / "latents")
    assert [read_pair(path).source.video for path in paths] == [f"v_Wave_g{i:02d}_c01.mp4" for i in range(1, 9)]
    for path in paths[1::3]:
        path.unlink()
    assert main(argv) == 0
    assert "3 pairs extracted, 5 already there, 0 skipped" in capsys.readouterr().out
    assert find_pairs(tmp_path / "latents") == paths


def test_the_group_of_processes_ends_with_the_command(tmp_path):
    save_latent(tmp_path / "a.latent", torch.randn(1, 16, 1, 4, 4), "hunyuan_video", None, {})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert main(["inspect", str(tmp_path / "a.latent")]) == 0
    assert not torch.distributed.is_initialized()
