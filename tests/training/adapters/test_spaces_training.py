"""Every pair of latent spaces can be extracted, trained and evaluated, if an adapter can join their grids."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15

from conftest import make_videos
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.kvae import KVAE, save_kvae
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import Pair, find_pairs, read_pair, write_pair
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vaes import check_grids, load_hunyuan_vae
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
        ("hunyuan_video", "kvae_3d_2.0_t4s16"),
    ],
)
def test_every_pair_of_spaces_is_extracted_trained_and_evaluated(tmp_path, h, k):
    make_videos(tmp_path / "videos", 2, frames=9, height=64, width=96)
    vaes = ["--hunyuan-vae", hunyuan(tmp_path, h), "--kvae", kvae(tmp_path, k)]
    latents, out = tmp_path / "latents", tmp_path / "out"
    videos, cpu = ["--videos-root", str(tmp_path / "videos")], ["--device", "cpu"]
    size = ["--num-frames", "9", "--height", "64", "--width", "96"]
    assert main(["extract", *videos, "--output-root", str(latents), *size, *vaes, *cpu, "--batch-size", "2"]) == 0
    pair, spaces = read_pair(find_pairs(latents)[0]), (latent_space(h), latent_space(k))
    for z, space in zip((pair.z_h, pair.z_k), spaces, strict=True):
        assert z.shape == space.latent_shape(9, 64, 96)

    more = tmp_path / "more"  # random latents: two small clips are too few to fit maps of up to 1,729 weights
    for i in range(2):
        z_h, z_k = (torch.randn(space.latent_shape(17, 224, 224)) for space in spaces)
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
    shares = result["latent"]["channels"]
    assert [len(shares[f"{arrow} share"]) for arrow in ("K→H", "H→K")] == [space.channels for space in spaces]
    assert f"{h} → {k}" in (out / "report.html").read_text()


def test_hunyuan_15_decodes_a_batch_as_its_clips(tmp_path):
    vae = load_hunyuan_vae(hunyuan(tmp_path, "hunyuan_video_1.5"), "cpu")
    frames = torch.randint(0, 256, (2, 3, 5, 32, 48), dtype=torch.uint8)
    z = vae.encode(frames)
    assert z.shape == (2, 32, 2, 2, 3)
    torch.testing.assert_close(z[1:], vae.encode(frames[1:]))
    y = vae.decode(z)
    assert y.shape == (2, 3, 5, 32, 48)
    torch.testing.assert_close(y[:1], vae.decode(z[:1]))


def test_spaces_whose_grids_no_adapter_joins_are_refused():
    h, k = latent_space("hunyuan_video"), replace(latent_space("kvae_3d_1.0"), spatial_factor=12)
    with pytest.raises(UserError, match="4 frames of 8x8 pixels, .* 12x12 pixels; .* hunyuan_video with kvae_3d_2.0"):
        check_grids(h, k)
