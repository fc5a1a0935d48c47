"""The command `encode`: latents of whole videos, in the files of every program, that load_latent reads back."""

import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import needs
from command import refusal, start
from conftest import make_videos, moving_picture
from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import load_adapter, save_adapter
from kvae_comfyui.adapters.networks import Residual
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import KVAE, load_kvae
from kvae_comfyui.kvae.load import described_state, save_kvae
from kvae_comfyui.kvae.signature import signature
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.serving.latent_writers import ENDINGS
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.serving.video_reader import read_pictures
from kvae_comfyui.serving.video_writer import write_video
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.served import ServedOptions, load_served
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS
from small_models import small

NAME = "v_Wave_g01_c01"


def encode(folder, *options, out="out"):
    words = ["encode", str(folder / "videos"), "--output", str(folder / out), "--device", "cpu"]
    return main([*words, *options])


def frames_of(path, height, width):
    """The frames of a video, cut in the middle, [1, 3, T, H, W] in −1..1."""
    frames = np.stack([picture.rgb for picture in read_pictures(path, range(1000))])
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    x = torch.from_numpy(frames[:, top : top + height, left : left + width])
    return x.permute(3, 0, 1, 2)[None] / 127.5 - 1


def expected(x, space="hunyuan_video", **options):
    """The latent of frames [1, 3, T, H, W], of which the last is repeated up to 4n + 1, encoded whole."""
    x = torch.cat([x, x[:, :, -1:].expand(-1, -1, (1 - x.shape[2]) % 4, -1, -1)], dim=2)
    with torch.no_grad():
        return load_served(ServedOptions(device="cpu", **options), space, ("encode",)).encode(x)


@pytest.mark.parametrize("form", ENDINGS)
def test_every_format_holds_the_latent_of_the_whole_video(tmp_path, form):
    (video,) = make_videos(tmp_path / "videos", 1, frames=22)
    assert encode(tmp_path, "--format", form) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == NAME + ENDINGS[form]
    found = load_latent(path)
    assert (found.space, found.frames) == ("hunyuan_video", 22)
    torch.testing.assert_close(found.z, expected(frames_of(video, 48, 64)), atol=1e-4, rtol=1e-4)


def test_what_is_decoded_again_is_the_video(tmp_path):
    (video,) = make_videos(tmp_path / "videos", 1, frames=18)
    assert encode(tmp_path, "--format", "musubi") == 0
    words = ["decode", str(tmp_path / "out"), "--output", str(tmp_path / "again"), "--device", "cpu"]
    assert main(words) == 0
    again = tmp_path / "again" / f"{NAME}.mp4"
    assert index_video(again).count == 18
    x = frames_of(video, 48, 64)
    assert (frames_of(again, 48, 64) - x).square().mean() < x.var() / 4  # through two small, untuned adapters


def test_a_videos_own_size_is_cut_to_whole_latents(tmp_path):
    write_video(tmp_path / "videos" / "a.mp4", moving_picture(5, 54, 70), 24)
    assert encode(tmp_path) == 0
    z = load_latent(tmp_path / "out" / "a.latent").z
    torch.testing.assert_close(z, expected(frames_of(tmp_path / "videos" / "a.mp4", 48, 64)), atol=1e-4, rtol=1e-4)


def test_a_size_is_cut_and_resized(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=5)
    assert encode(tmp_path, "--height", "32", "--width", "32") == 0
    assert load_latent(tmp_path / "out" / f"{NAME}.latent").z.shape == (1, 16, 2, 4, 4)
    for size in (["--height", "32"], ["--height", "32", "--width", "36"]):
        words = ["encode", str(tmp_path / "videos"), "--output", str(tmp_path / "x"), "--device", "cpu"]
        assert "expected both, in multiples of 8" in refusal([*words, *size], capsys)


def test_an_image_becomes_a_latent_of_one_frame(tmp_path):
    (tmp_path / "videos").mkdir()
    picture = moving_picture(1, 32, 48)[:, 0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "videos" / "a.png")
    assert encode(tmp_path) == 0
    found = load_latent(tmp_path / "out" / "a.latent")
    x = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    assert found.frames == 1
    torch.testing.assert_close(found.z, expected(x), atol=1e-4, rtol=1e-4)


def test_a_space_without_a_trained_adapter_works_alike(tmp_path):
    """HunyuanVideo 1.5 over KVAE-3D-2.0-t4s16, small and random."""
    kvae, spaces = small("2.0-t4s16"), (SPACES["kvae_3d_2.0_t4s16"], SPACES["hunyuan_video_1.5"])
    save_file(described_state(kvae), tmp_path / "kvae.safetensors")
    save_adapter(tmp_path / "k2h.safetensors", LatentAdapter(Residual(64, 32), *spaces, weights={}))
    make_videos(tmp_path / "videos", 1, frames=9)
    files = {"kvae": str(tmp_path / "kvae.safetensors"), "adapter_k2h": str(tmp_path / "k2h.safetensors")}
    flags = [word for key, path in files.items() for word in ("--" + key.replace("_", "-"), path)]
    assert encode(tmp_path, "--space", "hunyuan_video_1.5", "--format", "musubi", *flags) == 0
    found = load_latent(tmp_path / "out" / f"{NAME}.safetensors")
    assert (found.space, found.z.shape) == ("hunyuan_video_1.5", (1, 32, 3, 3, 4))
    x = frames_of(tmp_path / "videos" / f"{NAME}.mp4", 48, 64)
    torch.testing.assert_close(found.z, expected(x, "hunyuan_video_1.5", **files), atol=1e-4, rtol=1e-4)


def test_a_video_that_cannot_be_read_is_skipped(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=5)
    (tmp_path / "videos" / "b.mp4").write_text("no video")
    assert encode(tmp_path) == 1
    out, err = capsys.readouterr()
    assert out.startswith("1 encoded, 0 already there, 1 skipped")
    (line,) = err.splitlines()
    assert line.startswith("skipped: ") and "b.mp4: not a video" in line


@pytest.mark.parametrize(("form", "space"), [("musubi", "kvae_3d_1.0"), ("kandinsky", "kvae_3d_1.0")])
def test_a_format_that_does_not_hold_the_space_is_refused(tmp_path, capsys, form, space):
    words = ["encode", "absent.mp4", "--output", str(tmp_path / "x"), "--format", form, "--space", space]
    assert f"--format is {form}, --space is {space}" in refusal([*words, "--device", "cpu"], capsys)


def test_what_is_there_is_kept_and_nothing_else_is_replaced(tmp_path, capsys):
    make_videos(tmp_path / "videos", 2, frames=5)
    assert encode(tmp_path) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_video(tmp_path / "videos" / f"{NAME}.mp4", moving_picture(5, 48, 64, seed=9), 24)
    capsys.readouterr()
    assert encode(tmp_path) == 1
    out, err = capsys.readouterr()
    assert out.startswith("0 encoded, 1 already there, 1 skipped")
    assert f"{NAME}.latent: is there already, and made of another file" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@needs.posix
def test_a_killed_run_continues(tmp_path):
    make_videos(tmp_path / "videos", 12, frames=9, height=32, width=32)
    words = "encode", tmp_path / "videos", "--output", tmp_path / "out", "--device", "cpu"
    process = start(*words)
    deadline = time.time() + 120
    while len(list((tmp_path / "out").glob("*.latent"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list((tmp_path / "out").glob("*.latent")))
    assert 2 <= done < 12
    process = start(*words)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert f"{12 - done} encoded, {done} already there, 0 skipped" in out
    assert all(load_latent(path).frames == 9 for path in (tmp_path / "out").glob("*.latent"))
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_the_memory_grows_by_the_latents_only(tmp_path):
    peaks = []
    for frames in (49, 81):
        make_videos(tmp_path / str(frames) / "videos", 1, frames=frames, height=16, width=16)
        with PeakMemory() as memory:
            assert encode(tmp_path / str(frames)) == 0
        peaks.append(memory.peak)
    pixels = 32 * 3 * 16 * 16 * 4  # bytes by which the frames grow
    assert peaks[1] - peaks[0] < pixels / 4


def another_kvae(path):
    """A KVAE of the tiny one's shape, with other weights."""
    kvae = KVAE(load_kvae(TINY["kvae"]).config).eval()
    save_kvae(path, kvae, torch.float16, {})
    return kvae


def decoded(folder, *options):
    return main(["decode", str(folder / "out"), "--output", str(folder / "again"), "--device", "cpu", *options])


def test_a_latent_names_its_vae_and_is_not_decoded_by_another(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=5)
    other = tmp_path / "other.safetensors"
    another_kvae(other)
    assert encode(tmp_path, "--space", "kvae_3d_1.0") == 0
    assert "It is of this project's tiny KVAE (kvae_3d_1.0)." in inspected(tmp_path / "out", capsys)
    assert decoded(tmp_path, "--kvae", str(other)) == 2
    error = capsys.readouterr().err
    assert "a latent of this project's tiny KVAE (kvae_3d_1.0); expected one of the kvae_3d_1.0 VAE whose" in error
    assert not (tmp_path / "again").exists()
    assert decoded(tmp_path, "--dtype", "bf16") == 0


def test_a_latent_of_the_foreign_space_is_decoded_by_every_kvae_with_an_adapter_for_it(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=5)
    kvae, theirs = another_kvae(tmp_path / "kvae.safetensors"), load_adapter(TINY_ADAPTERS["h2k"])
    weights = {"hunyuan_video": theirs.weights["hunyuan_video"]}
    weights["kvae_3d_1.0"] = VAEWeights("", signature(kvae.state_dict()))
    for name, each in (("fits", weights), ("other", weights | {"hunyuan_video": weights["kvae_3d_1.0"]})):
        adapter = LatentAdapter(theirs.network, theirs.source, theirs.target, weights=each)
        save_adapter(tmp_path / f"{name}.safetensors", adapter)
    assert encode(tmp_path) == 0
    assert "It is of this project's tiny HunyuanVideo VAE (hunyuan_video)." in inspected(tmp_path / "out", capsys)
    options = "--kvae", str(tmp_path / "kvae.safetensors"), "--adapter-h2k"
    assert decoded(tmp_path, *options, str(tmp_path / "fits.safetensors")) == 0
    assert decoded(tmp_path, *options, str(tmp_path / "other.safetensors")) == 2
    assert decoded(tmp_path, *options, str(TINY_ADAPTERS["h2k"])) == 2
    assert "was made for this project's tiny KVAE (kvae_3d_1.0); this is the kvae_3d_1.0" in capsys.readouterr().err


def inspected(folder, capsys):
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    return capsys.readouterr().out
