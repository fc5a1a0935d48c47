"""`encode` with a KVAE whose grid is coarser than that of the latents: sizes are whole latents of both."""

import pytest
import torch

from command import refusal
from conftest import make_videos
from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import save_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.kvae import save_kvae
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.training.cli import main
from small_models import small


@pytest.fixture
def words(tmp_path):
    """The words of a command that encodes a video of 56x40 pixels, and decodes it again."""
    make_videos(tmp_path / "videos", 1, frames=5, height=40, width=56)
    save_kvae(tmp_path / "kvae.safetensors", small("2.0-t4s16"), torch.float32, {})
    spaces = [latent_space(name) for name in ("hunyuan_video", "kvae_3d_2.0_t4s16")]
    files = {"h2k": spaces, "k2h": spaces[::-1]}
    for name, way in files.items():
        save_adapter(tmp_path / f"{name}.safetensors", LatentAdapter(Affine(64, 64), *way))
    adapters = [word for name in files for word in (f"--adapter-{name}", str(tmp_path / f"{name}.safetensors"))]
    return ["--kvae", str(tmp_path / "kvae.safetensors"), *adapters, "--device", "cpu"]


def test_a_video_is_cut_to_whole_latents_of_both_grids_and_decodes_again(tmp_path, words):
    assert main(["encode", str(tmp_path / "videos"), "--output", str(tmp_path / "out"), *words]) == 0
    (path,) = (tmp_path / "out").iterdir()
    found = load_latent(path)
    assert found.space == "hunyuan_video" and found.z.shape == (1, 16, 2, 4, 6)
    assert main(["decode", str(path), "--output", str(tmp_path / "decoded"), *words]) == 0


def test_sizes_that_make_no_whole_latents_of_both_are_refused(tmp_path, words, capsys):
    argv = ["encode", str(tmp_path / "videos"), "--output", str(tmp_path / "out"), *words]
    assert "expected both, in multiples of 16" in refusal([*argv, "--height", "40", "--width", "56"], capsys)
    assert not (tmp_path / "out").exists()
