"""The commands run on a stand-in for Apple's GPU, and find there what they find on a CPU."""

import json

import pytest
import torch

from apple_gpu import AppleGPU
from conftest import make_videos
from kvae_comfyui.training.adapters import train
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.pairs import find_pairs, read_pair
from kvae_comfyui.training.tiny.components import fit_components

CLIP = ["--num-frames", "9", "--height", "64", "--width", "64"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command on the stand-in, in one thread, in a folder with videos."""

    def in_one_thread(streams, threads, waiting):
        for stream in streams:
            yield from stream

    monkeypatch.setattr(train, "ahead", in_one_thread)
    monkeypatch.setattr(extract, "ahead", in_one_thread)
    monkeypatch.chdir(tmp_path)

    def command(*words: str, device: str = "mps") -> set[str]:
        with AppleGPU() as gpu:
            assert main([*words, "--device", device]) == 0
        return gpu.operators

    return command


def test_extract_train_and_evaluate(run, tmp_path):
    make_videos(tmp_path / "videos", 4, frames=9, height=64, width=64)
    for device in ("cpu", "mps"):
        operators = run("extract", "--videos-root", "videos", "--output-root", device, *CLIP, device=device)
    assert "aten::convolution" in operators
    for one, other in zip(find_pairs("cpu"), find_pairs("mps"), strict=True):
        torch.testing.assert_close(read_pair(one).z_k, read_pair(other).z_k, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(read_pair(one).z_h, read_pair(other).z_h, rtol=2e-3, atol=2e-3)
    errors = {}
    for device in ("cpu", "mps"):
        adapters = ["h2k", f"{device}_adapters/h2k.safetensors", "k2h", f"{device}_adapters/k2h.safetensors"]
        out = [word if i % 2 else f"--out-{word}" for i, word in enumerate(adapters)]
        run("train", "--latent-root", "cpu", *out, "--epochs", "1", "--batch-size", "2", device=device)
        given = [word if i % 2 else f"--adapter-{word}" for i, word in enumerate(adapters)]
        videos = ["--videos-root", "videos", "--num-pixel-samples", "1", "--train-latent-root", "cpu"]
        run("evaluate", "--latent-root", "cpu", *videos, *given, "--output-root", f"{device}_out", device=device)
        errors[device] = json.loads((tmp_path / f"{device}_out" / "evaluation.json").read_text())
    for name, figures in errors["cpu"]["latent"]["figures"].items():
        assert errors["mps"]["latent"]["figures"][name]["mse"] == pytest.approx(figures["mse"], rel=1e-3), name
    for name, figures in errors["cpu"]["pixel"]["figures"].items():
        assert errors["mps"]["pixel"]["figures"][name]["psnr"] == pytest.approx(figures["psnr"], abs=0.05), name


def test_the_published_network(run, tmp_path):
    make_videos(tmp_path / "videos", 4, frames=9, height=64, width=64)
    run("extract", "--videos-root", "videos", "--output-root", "latents", *CLIP, device="cpu")
    run("train", "--latent-root", "latents", "--network", "published", "--epochs", "1")


@pytest.mark.parametrize("model", ["kvae", "hunyuan"])
def test_tiny(run, tmp_path, model):
    for validation_video in make_videos(tmp_path / "videos", 8, frames=17, height=64, width=64)[1:7]:
        validation_video.unlink()  # one is enough
    stages = ["--stages", "1x32x1:skeleton,1x32x1"]
    run("tiny", "--model", model, "--videos-root", "videos", "--output", f"{model}.safetensors", *stages)


def test_principal_components_are_fitted_in_float64():
    blocks = torch.randn(4, 2, 3, 3, 20) * torch.arange(1, 21)
    mean, projection = fit_components(blocks, count=5)
    with AppleGPU():
        found = fit_components(blocks.to("mps"), count=5)
        torch.testing.assert_close(found[0].cpu(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1].cpu().abs(), projection.abs(), rtol=1e-3, atol=1e-4)
