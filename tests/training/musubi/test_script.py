"""Unmodified scripts of musubi-tuner run with KVAE in the place of their VAE."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from command import refusal
from conftest import ROOT, make_videos
from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import save_adapter
from kvae_comfyui.adapters.networks import Residual
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.kvae import save_kvae
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.training.served import ServedOptions, load_served
from small_models import small

# musubi-tuner reads its files wherever it has a GPU's index at import; without a GPU it would stop there
START = "import sys, torch; torch.cuda.current_device = lambda: 0; sys.path.insert(0, '.')\n"
MAIN = "from kvae_comfyui.training.cli import main; sys.exit(main(sys.argv[1:]))"

LOADER = """
def load_vae(vae_type="", vae_dtype=None, sample_size=None, vae_path=None, device=None):
    raise AssertionError("the VAE of musubi-tuner")
"""
SCRIPT = """
import sys
import torch
from musubi_tuner.hunyuan_model.vae import load_vae

def main():
    print(sys.argv[1:])
    vae, _, side, rate = load_vae(vae_dtype=torch.float16, device="cpu", vae_path="x")
    print(side, rate, list(vae.decode(torch.zeros(1, 16, 2, 4, 4), return_dict=False)[0].shape))
    return 3
"""


def run(*argv, code=MAIN):
    """Run the command as a user does; return its exit code and what it printed. Nothing of it stays in this process."""
    done = subprocess.run(
        [sys.executable, "-c", START + code, "musubi", *map(str, argv)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A musubi-tuner with one script, which has the real one's function for loading a VAE."""
    package = tmp_path / "musubi" / "src" / "musubi_tuner"
    (package / "hunyuan_model").mkdir(parents=True)
    for name, text in (("__init__", ""), ("hunyuan_model/__init__", ""), ("hunyuan_model/vae", LOADER)):
        (package / f"{name}.py").write_text(text)
    (package / "hv_generate_video.py").write_text(SCRIPT)
    return tmp_path / "musubi"


def test_a_script_gets_its_arguments_and_kvae(checkout):
    code, said = run(
        "--musubi", checkout, "--device", "cpu", "hv_generate_video.py", "--prompt", "", "--kvae", "its own"
    )
    assert code == 3
    assert "['--prompt', '', '--kvae', 'its own', '--vae', 'tiny']" in said
    assert "8 4 [1, 3, 5, 32, 32]" in said


def test_a_script_keeps_the_vae_that_it_is_given(checkout):
    code, said = run("--musubi", checkout, "hv_generate_video", "--vae=theirs.safetensors")
    assert code == 3 and "['--vae=theirs.safetensors']" in said


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("hunyuan_model/vae.py", "", "no musubi_tuner.hunyuan_model.vae.load_vae; expected version"),
        ("hunyuan_model/vae.py", "def load_vae(path): ...", "has no device, vae_dtype, vae_path; expected version"),
        ("hunyuan_model/vae.py", "import absent_package", "No module named 'absent_package'); install musubi-tuner's"),
        ("hv_generate_video.py", None, "hv_generate_video.py: no such file; --musubi must be a checkout"),
    ],
)
def test_another_musubi_tuner_is_refused_in_one_line(file, text, words, checkout):
    path = checkout / "src" / "musubi_tuner" / file
    path.unlink() if text is None else path.write_text(text)
    code, said = run("--musubi", checkout, "hv_generate_video.py")
    assert code == 2 and words in said.splitlines()[-1]


def test_a_script_with_another_vae_is_refused(checkout, capsys):
    said = refusal(["musubi", "--musubi", str(checkout), "wan_generate_video.py"], capsys)
    assert "wan_generate_video.py: KVAE cannot stand in for its VAE; expected one of cache_latents.py" in said


def test_an_adapter_for_encoding_is_needed_to_cache(checkout, capsys, tmp_path):
    (checkout / "src" / "musubi_tuner" / "cache_latents.py").write_text(SCRIPT)
    save_kvae(path := tmp_path / "kvae.safetensors", small("1.0"), torch.float32, {})
    argv = ["musubi", "--musubi", str(checkout), "--kvae", str(path), "--device", "cpu", "cache_latents.py"]
    assert "--adapter-k2h is missing: to encode hunyuan_video" in refusal(argv, capsys)


# with the real musubi-tuner


@pytest.fixture
def job(tmp_path) -> Path:
    """A dataset of two clips, its config, and a KVAE with adapters for HunyuanVideo 1.5."""
    for path in make_videos(tmp_path / "videos", 2, frames=20, height=64, width=96):
        path.with_suffix(".txt").write_text("waves")
    (tmp_path / "data.toml").write_text(
        f'[general]\nresolution = [96, 64]\ncaption_extension = ".txt"\n[[datasets]]\ntarget_frames = [17]\n'
        f'video_directory = "{tmp_path}/videos"\ncache_directory = "{tmp_path}/cache"\n'
    )
    torch.manual_seed(0)
    save_kvae(tmp_path / "t4s16.safetensors", small("2.0-t4s16"), torch.float32, {})
    h, k = SPACES["hunyuan_video_1.5"], SPACES["kvae_3d_2.0_t4s16"]
    for name, source, target in (("h2k", h, k), ("k2h", k, h)):
        adapter = LatentAdapter(Residual(source.channels, target.channels), source, target)
        save_adapter(tmp_path / f"{name}.safetensors", adapter)
    return tmp_path


def options_of(script: str, job: Path) -> list[str]:
    """The command's own options for a script."""
    kvae = ["--kvae", f"{job}/t4s16.safetensors", "--adapter-h2k", f"{job}/h2k.safetensors"]
    newer = [*kvae, "--adapter-k2h", f"{job}/k2h.safetensors"]
    return ["--musubi", os.environ["MUSUBI_PATH"], "--device", "cpu", *(newer if "1_5" in script else [])]


@needs.musubi
@pytest.mark.parametrize(
    ("script", "short", "channels", "scale"),
    [
        ("cache_latents", "hv", 16, 1),
        ("hv_1_5_cache_latents", "hv15", 32, 1),
        ("kandinsky5_cache_latents", "k5", 16, 0.476986),
    ],
)
def test_the_caching_scripts_cache_what_kvae_encodes(script, short, channels, scale, job):
    code, said = run(*options_of(script, job), f"{script}.py", "--dataset_config", job / "data.toml", "--device", "cpu")
    assert code == 0, said
    caches = sorted((job / "cache").glob(f"*_{short}.safetensors"))
    assert [path.name.rpartition("_00000-017_")[0] for path in caches] == ["v_Wave_g01_c01", "v_Wave_g02_c01"]
    z = next(value for key, value in load_file(caches[0]).items() if key.startswith("latents_5x"))
    assert z.shape[:2] == (channels, 5)
    if channels == 16:
        vae = load_served(ServedOptions(device="cpu"), "hunyuan_video", ("encode",))
        expected = scale * vae.encode(pixels_of(job / "videos" / "v_Wave_g01_c01.mp4"))[0]
        torch.testing.assert_close(z.float(), expected, atol=2e-3, rtol=2e-3)


def pixels_of(path: Path) -> torch.Tensor:
    """The first 17 frames as musubi-tuner decodes them, [1, 3, T, H, W] in −1..1."""
    with av.open(str(path)) as video:
        frames = [torch.from_numpy(np.asarray(frame.to_image())) for frame in islice(video.decode(video=0), 17)]
    return torch.stack(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@needs.musubi
@pytest.mark.parametrize(
    ("script", "channels", "side"), [("hv_generate_video", 16, 8), ("hv_1_5_generate_video", 32, 4)]
)
def test_the_generating_scripts_decode_a_latent(script, channels, side, job):
    metadata = {"height": "64", "width": "96", "video_length": "9", "seeds": "1"}
    save_file(
        {"latent": torch.randn(channels, 3, side, side * 3 // 2)}, latent := job / "a_latent.safetensors", metadata
    )
    encoders = (
        ["--text_encoder1", "x", "--text_encoder2", "x"] if channels == 16 else ["--text_encoder", "x", "--byt5", "x"]
    )
    code, said = run(
        *options_of(script, job), script, "--prompt", "x", "--dit", "x", *encoders, "--latent_path", latent,
        "--save_path", job / "out", "--output_type", "video", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, said
    (video,) = (job / "out").rglob("*.mp4")
    assert index_video(video).count == 9


FUNCTIONS = """
from argparse import Namespace
from kvae_comfyui.training.musubi.script import HUNYUAN, KANDINSKY, replace_loader
from kvae_comfyui.training.served import ServedOptions, load_served
from kvae_comfyui.serving.pipeline_vae import PipelineVAE
import os
sys.path.insert(0, os.environ["MUSUBI_PATH"] + "/src")
host = load_served(ServedOptions(device="cpu"), "hunyuan_video")
for loader in (HUNYUAN, KANDINSKY):
    replace_loader(loader, PipelineVAE(host))
device, x = torch.device("cpu"), torch.rand(1, 3, 9, 32, 48)
expected = host.encode(2 * x - 1)
same = lambda a, b, atol=5e-3: torch.testing.assert_close(a.float(), b, atol=atol, rtol=5e-3)

from musubi_tuner import hv_generate_video as hv
args = Namespace(vae_dtype="float32", vae="x", vae_chunk_size=32, vae_spatial_tile_sample_min_size=128)
same(hv.encode_to_latents(args, x, device), 0.476986 * expected)
same(hv.decode_latents(args, 0.476986 * expected, device), (host.decode(expected) / 2 + 0.5).clamp(0, 1))

from musubi_tuner import hv_train_network, hv_train
vae = hv_train_network.HunyuanVideoNetworkTrainer().load_vae(Namespace(
    vae_chunk_size=None, vae_spatial_tile_sample_min_size=None, vae_tiling=True), torch.float16, "x")
vae.requires_grad_(False); vae.eval(); vae.to(device)
same(vae.decode(expected, return_dict=False)[0], host.decode(expected))

from musubi_tuner.kandinsky5 import generation_utils as k5
from musubi_tuner.kandinsky5_train_network import Kandinsky5NetworkTrainer
trainer = Kandinsky5NetworkTrainer()
trainer.task_conf, trainer._vae_checkpoint_path = Namespace(vae=Namespace(name="hunyuan")), "x"
vae = trainer._load_vae_for_sampling(args, device)
frames = k5.decode_latents((0.476986 * expected[0]).permute(1, 2, 3, 0), vae, device)
same(frames.permute(0, 4, 1, 2, 3), ((host.decode(expected).clamp(-1, 1) + 1) * 127.5).byte().float(), 1.0)
from PIL import Image
_, z, _ = k5.get_first_frame_from_image(Image.new("RGB", (96, 64), "red"), vae, device, 96 * 64, 16)
red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 64, 96)
same(z.squeeze().movedim(-1, 0), 0.476986 * host.encode(red)[0, :, 0])
print("all the same")
"""


@needs.musubi
def test_the_functions_that_call_a_vae_get_kvae():
    code, said = run(code=FUNCTIONS)
    assert code == 0 and "all the same" in said, said
