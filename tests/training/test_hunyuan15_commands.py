"""Every command serves HunyuanVideo 1.5 and KVAE 2.0-t4s16: 32 and 64 channels, one latent for 16x16 pixels.

tests/training/adapters/test_spaces_training.py evaluates such adapters.
"""

import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from conftest import make_videos
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.kvae import save_kvae
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.pairs import Pair, write_pair
from small_models import small

H, K = "hunyuan_video_1.5", "kvae_3d_2.0_t4s16"
SIZE = ["--height", "64", "--width", "96"]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two small random VAEs, two videos, their pairs, and adapters trained on packed pairs."""
    folder = tmp_path_factory.mktemp("hunyuan15")
    torch.manual_seed(0)
    AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 16, 32, 64), layers_per_block=1).save_pretrained(
        folder / "vae"
    )
    save_kvae(folder / "kvae.safetensors", small("2.0-t4s16"), torch.float32, {})
    make_videos(folder / "videos", 2, frames=9, height=64, width=96)
    extract = ["extract", "--videos-root", f"{folder}/videos", "--output-root", f"{folder}/latents"]
    assert main([*extract, *vaes(folder), *SIZE, "--num-frames", "9", "--batch-size", "2", *CPU]) == 0
    # random pairs to train on: two small clips are too few to fit maps of 1,729 weights
    for i in range(2):
        z = (torch.randn(channels, 5, 14, 14) for channels in (32, 64))
        write_pair(folder / "more" / f"{i}.safetensors.zst", Pair(*z, None))
    shutil.copyfile(folder / "latents" / "manifest.json", folder / "more" / "manifest.json")
    assert main(["pack", "--latent-root", f"{folder}/more", "--output-root", f"{folder}/shards"]) == 0
    train = ["train", "--latent-root", f"{folder}/shards", "--val-latent-root", f"{folder}/latents", "--epochs", "1"]
    assert main([*train, *adapters(folder, "--out-"), *CPU]) == 0
    return folder


def vaes(folder):
    return ["--hunyuan-vae", f"{folder}/vae", "--kvae", f"{folder}/kvae.safetensors"]


def adapters(folder, flag="--adapter-"):
    return [word for way in ("h2k", "k2h") for word in (f"{flag}{way}", f"{folder}/{way}.safetensors")]


def test_pairs_are_extracted_packed_and_trained_on(job):
    assert [pair.z_h.shape + pair.z_k.shape for pair in open_pairs(job / "latents")] == [(32, 3, 4, 6, 64, 3, 4, 6)] * 2
    assert open_pairs(job / "shards")[0].z_k.shape == (64, 5, 14, 14)
    ways = [load_adapter(job / f"{way}.safetensors") for way in ("h2k", "k2h")]
    assert [(each.source.name, each.target.name) for each in ways] == [(H, K), (K, H)]


@pytest.mark.parametrize("vae", ["hunyuan", "kvae"])
def test_a_video_is_reconstructed(job, vae, capsys):
    out = f"{job}/{vae}.mp4"
    video = next((job / "videos").glob("*.mp4"))
    reconstruct = ["reconstruct", "--video-path", str(video), "--vae", vae, *vaes(job), "--output", out]
    assert main([*reconstruct, *SIZE, "--num-frames", "9", *CPU]) == 0
    assert "9 frames: PSNR" in capsys.readouterr().out
    assert index_video(out).count == 9


@pytest.mark.parametrize("form", ["comfyui", "musubi", "diffusers"])
def test_videos_become_latent_files_and_videos_again(job, form, capsys):
    served = [*vaes(job)[2:], *adapters(job), *CPU]
    latents, videos = job / form / "latents", job / form / "videos"
    encode = ["encode", f"{job}/videos", "--output", str(latents), "--format", form, "--space", H]
    assert main([*encode, *served]) == 0
    files = sorted(latents.iterdir())
    assert load_latent(files[0]).z.shape == (1, 32, 3, 4, 6)
    capsys.readouterr()
    assert main(["inspect", str(latents)]) == 0
    assert capsys.readouterr().out.count("It decodes to 9 frames of 96 x 64 pixels") == 2
    assert main(["decode", str(latents), "--output", str(videos), *served]) == 0
    assert [index_video(video).count for video in sorted(videos.iterdir())] == [9, 9]
