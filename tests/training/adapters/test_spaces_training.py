"""Every pair of latent spaces of one grid can be extracted, trained and evaluated; different grids are refused."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15

from conftest import make_videos
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.kvae import KVAE, save_kvae
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import Pair, find_pairs, read_pair, write_pair
from kvae_comfyui.training.vaes import load_hunyuan_vae, load_kvae_for_training
from small_models import SMALL


def hunyuan(folder, name):
    """A small random VAE of a HunyuanVideo space, as diffusers saves it."""
    if name == "hunyuan_video":
        vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)
    else:
        vae = AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 16, 32, 64), layers_per_block=1)
    vae.save_pretrained(folder / name)
    return str(folder / name)


def kvae(folder, name):
    path = folder / f"{name}.safetensors"
    save_kvae(path, KVAE(SMALL[name.removeprefix("kvae_3d_").replace("_", "-")]), torch.float32, {})
    return str(path)


@pytest.mark.parametrize(
    ("h", "k"),
    [
        ("hunyuan_video", "kvae_3d_1.0"),
        ("hunyuan_video", "kvae_3d_2.0_t4s8"),
        ("hunyuan_video_1.5", "kvae_3d_2.0_t4s16"),
    ],
)
def test_every_pair_of_spaces_of_one_grid_is_extracted_trained_and_evaluated(tmp_path, h, k):
    make_videos(tmp_path / "videos", 2, frames=9, height=64, width=96)
    vaes = ["--hunyuan-vae", hunyuan(tmp_path, h), "--kvae", kvae(tmp_path, k)]
    latents, out = tmp_path / "latents", tmp_path / "out"
    videos, cpu = ["--videos-root", str(tmp_path / "videos")], ["--device", "cpu"]
    size = ["--num-frames", "9", "--height", "64", "--width", "96"]
    assert main(["extract", *videos, "--output-root", str(latents), *size, *vaes, *cpu, "--batch-size", "2"]) == 0
    channels, side = {"hunyuan_video": (16, 8), "hunyuan_video_1.5": (32, 16)}[h]
    pair = read_pair(find_pairs(latents)[0])
    assert pair.z_h.shape == (channels, 3, 64 // side, 96 // side)
    assert pair.z_k.shape == (load_kvae_for_training(vaes[3], "cpu").space.channels, *pair.z_h.shape[1:])

    more = tmp_path / "more"  # random latents: two small clips are too few to fit maps of up to 1,729 weights
    for i in range(2):
        z_h, z_k = (torch.randn(len(z), 5, 14, 14) for z in (pair.z_h, pair.z_k))
        write_pair(more / f"{i}.safetensors.zst", Pair(z_h, z_k, None))
    shutil.copyfile(latents / "manifest.json", more / "manifest.json")
    adapters = [str(out / "h2k.safetensors"), str(out / "k2h.safetensors")]
    argv = ["train", "--latent-root", str(more), "--val-latent-root", str(latents), "--epochs", "1", *cpu]
    assert main([*argv, "--out-h2k", adapters[0], "--out-k2h", adapters[1]]) == 0
    found = load_adapter(adapters[0])
    assert (found.source.name, found.target.name) == (h, k)
    argv = ["evaluate", "--latent-root", str(latents), *videos, *vaes, "--num-pixel-samples", "1", *cpu]
    argv += ["--train-latent-root", str(more), "--adapter-h2k", adapters[0], "--adapter-k2h", adapters[1]]
    assert main([*argv, "--output-root", str(out)]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert result["pixel"]["figures"]["KVAE(H→K)"]["psnr"] > 0


def test_hunyuan_15_decodes_a_batch_as_its_clips(tmp_path):
    vae = load_hunyuan_vae(hunyuan(tmp_path, "hunyuan_video_1.5"), "cpu")
    frames = torch.randint(0, 256, (2, 3, 5, 32, 48), dtype=torch.uint8)
    z = vae.encode(frames)
    assert z.shape == (2, 32, 2, 2, 3)
    torch.testing.assert_close(z[1:], vae.encode(frames[1:]))
    y = vae.decode(z)
    assert y.shape == (2, 3, 5, 32, 48)
    torch.testing.assert_close(y[:1], vae.decode(z[:1]))


@pytest.mark.parametrize(("h", "k"), [("hunyuan_video", "kvae_3d_2.0_t4s16"), ("hunyuan_video_1.5", "kvae_3d_1.0")])
def test_spaces_of_different_grids_are_refused(tmp_path, capsys, h, k):
    make_videos(tmp_path / "videos", 1, frames=9)
    argv = ["extract", "--videos-root", str(tmp_path / "videos"), "--output-root", str(tmp_path / "latents")]
    assert main([*argv, "--hunyuan-vae", hunyuan(tmp_path, h), "--kvae", kvae(tmp_path, k), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert f"{h} has one latent for 4 frames of" in err and "hunyuan_video_1.5 with kvae_3d_2.0_t4s16" in err
    assert "hunyuan_video with kvae_3d_1.0" in err and not (tmp_path / "latents").exists()
