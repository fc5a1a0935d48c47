"""The command `decode`: every kind of latent file gives its frames, and what is there already stays as it is."""

import errno
import json
import signal
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import needs
from command import refusal, start
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.serving.latent_statistics import _say
from kvae_comfyui.serving.latent_writers import save_clip, save_latent
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.latents import decode as module
from kvae_comfyui.training.served import ServedOptions, load_served

H, K = SPACES["hunyuan_video"], SPACES["kvae_3d_1.0"]
SCALE = 0.476986


def latent(t=3, h=4, w=6, batch=1):
    return 2.1 * torch.randn(batch, 16, t, h, w)


def expected(z, space="hunyuan_video"):
    """Frames of the first clip as uint8 [T, H, W, 3], decoded whole."""
    with torch.no_grad():
        x = load_served(ServedOptions(device="cpu"), space, ("decode",)).decode(z)
    return ((x[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def decode(folder, *options, source=None):
    return main(["decode", str(source or folder / "in"), "--output", str(folder / "out"), "--device", "cpu", *options])


def save(folder, name, z, space="hunyuan_video", frames=None, others=()):
    path = folder / "in" / name
    save_latent(path, z, space, frames, {}, others)
    return path


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def assert_frames(found, frames):
    """Equal, except for rounding: a stream and a whole clip are computed in another order."""
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).max() <= 1


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_every_kind(folder, z):
    """One latent as every program writes it."""
    folder.mkdir(parents=True)
    for form in ("comfyui", "musubi", "diffusers", "kandinsky"):
        save_clip(folder / f"{form}.{'latent' if form == 'comfyui' else 'safetensors'}", z, H, 9, form, {})
    raw, scaled = z[0], z[0] * SCALE
    theirs = {"musubi_output": ({"latent": scaled}, {}), "musubi_batch": ({"latent": scaled[None]}, {})}
    ends = {"latents_image_2x4x6_float32": scaled[:, [0, -1]]}
    theirs["cache_hv"] = {"latents_3x4x6_float32": raw}, {"architecture": "hunyuan_video", "frame_count": "9"}
    theirs["cache_k5"] = {"latents_3x4x6_float32": scaled} | ends, {"architecture": "kandinsky5"}
    theirs["diffusers_k5"] = {"latents": scaled.permute(1, 2, 3, 0)[None]}, {}
    theirs["caption_hv_te"] = {"text": raw}, {"architecture": "hunyuan_video"}  # not a latent, and left out
    for name, (tensors, metadata) in theirs.items():
        save_file({key: each.contiguous() for key, each in tensors.items()}, folder / f"{name}.safetensors", metadata)


def test_every_kind_of_file_gives_the_same_frames(tmp_path, capsys):
    z = latent()
    write_every_kind(tmp_path / "in", z)
    assert decode(tmp_path, "--format", "frames") == 0
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 9
    for folder in folders:
        assert names(folder) == [f"{folder.name}_{i:05d}.png" for i in range(9)]
        assert_frames(pictures(folder), expected(z))
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"9 decoded, 0 already there, 0 skipped → {tmp_path / 'out'}"
    assert err == ""


def test_a_video_has_the_frames_and_the_rate_that_are_asked_for(tmp_path):
    save(tmp_path, "long.latent", latent(t=6), frames=18)
    assert decode(tmp_path, "--fps", "30", "--crf", "0") == 0
    video = tmp_path / "out" / "long.mp4"
    index = index_video(video)
    assert (index.count, index.rate) == (18, 30)
    assert names(tmp_path / "out") == ["long.mp4"]


def test_a_latent_of_one_frame_becomes_a_picture(tmp_path):
    z = latent(t=1)
    save(tmp_path, "image.latent", z)
    assert decode(tmp_path) == 0
    assert names(tmp_path / "out") == ["image.png"]
    assert_frames(pictures(tmp_path / "out"), expected(z))


def test_the_first_frame_alone_is_that_of_the_clip(tmp_path):
    z = latent(t=7)
    save(tmp_path, "a.latent", z)
    assert decode(tmp_path, "--format", "png") == 0
    assert_frames(pictures(tmp_path / "out"), expected(z)[:1])


def test_the_clips_of_a_batch_are_numbered(tmp_path):
    z = latent(batch=2)
    save(tmp_path, "both.latent", z)
    assert decode(tmp_path, "--format", "frames") == 0
    for clip in (0, 1):
        assert_frames(pictures(tmp_path / "out" / f"both.{clip:03d}"), expected(z[clip : clip + 1]))


def test_files_of_one_stem_do_not_overwrite_each_other(tmp_path, capsys):
    for name in ("a.latent", "a.safetensors", "A.b.latent", "below/a.latent"):
        save(tmp_path, name, latent(t=1))
    assert decode(tmp_path) == 0
    assert names(tmp_path / "out") == ["A.b.png", "a.latent.png", "a.safetensors.png", "below/a.png"]
    again = ["decode", f"{tmp_path}/in/a.latent", f"{tmp_path}/in/below/a.latent", "--output", f"{tmp_path}/x"]
    assert "would give results of one name" in refusal([*again, "--device", "cpu"], capsys)
    assert not (tmp_path / "x").exists()


def test_a_clip_of_a_batch_does_not_take_the_name_of_another_file(tmp_path, capsys):
    save(tmp_path, "a.latent", latent(t=1, batch=2))
    save(tmp_path, "a.001.latent", latent(t=1))
    assert decode(tmp_path) == 1
    assert names(tmp_path / "out") == ["a.001.png"]
    assert "a.001.png is the result of" in capsys.readouterr().err


def test_what_is_there_is_kept_and_nothing_else_is_replaced(tmp_path, capsys):
    for name in "abc":
        save(tmp_path, f"{name}.latent", latent())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.mp4").write_text("mine")
    assert decode(tmp_path) == 1
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    save(tmp_path, "c.latent", latent())
    capsys.readouterr()
    assert decode(tmp_path) == 1
    out, err = capsys.readouterr()
    assert out.startswith("0 decoded, 1 already there, 2 skipped")
    lines = err.splitlines()
    assert len(lines) == 2 and all("is there already, and made of another file" in line for line in lines)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert decode(tmp_path, "--fps", "12", source=tmp_path / "in" / "a.latent") == 2  # other settings
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_previews_of_all_files_come_before_the_long_work(tmp_path, monkeypatch):
    clips = {name: latent() for name in "ab"}
    for name, z in clips.items():
        save(tmp_path, f"{name}.latent", z)
    with monkeypatch.context() as patch:
        patch.setattr(module, "VideoWriter", lambda *_: signal.raise_signal(signal.SIGINT))
        assert decode(tmp_path, "--previews") == 130
    assert names(tmp_path / "out") == ["previews/a.jpg", "previews/b.jpg"]
    for name, z in clips.items():
        found = np.asarray(Image.open(tmp_path / "out" / "previews" / f"{name}.jpg")).astype(int)
        assert np.abs(found - expected(z)[0]).mean() < 8  # of a JPEG of noise
    before = (tmp_path / "out" / "previews" / "a.jpg").stat().st_mtime_ns
    assert decode(tmp_path, "--previews") == 0
    assert (tmp_path / "out" / "previews" / "a.jpg").stat().st_mtime_ns == before


def test_the_video_of_a_latent_with_sound_is_decoded(tmp_path, capsys):
    z = latent()
    save(tmp_path, "a.latent", z, others=[torch.randn(1, 8, 26, 16)])
    assert decode(tmp_path, "--format", "frames") == 0
    assert_frames(pictures(tmp_path / "out" / "a"), expected(z))
    assert decode(tmp_path, "--format", "frames") == 0  # and is not spoken of again
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.latent: only the video is decoded; the sound in it needs the audio VAE" in line


def test_a_run_decodes_the_spaces_that_its_kvae_serves(tmp_path, capsys):
    clips = {name: latent(t=1) for name in ("hunyuan_video", "kvae_3d_1.0")}
    for name, z in clips.items():
        save(tmp_path, f"{name}.latent", z, name)
    save(tmp_path, "other.latent", torch.randn(1, 32, 1, 4, 4), "hunyuan_video_1.5")
    save(tmp_path, "unknown.latent", latent(t=1), None)
    assert decode(tmp_path) == 1
    for name, z in clips.items():
        assert_frames(np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))[None], expected(z, name))
    other, unknown = capsys.readouterr().err.splitlines()
    assert "other.latent" in other and "hunyuan_video_1.5" in other
    assert "does not say whether it is of hunyuan_video or kvae_3d_1.0 or kvae_3d_2.0_t4s8; set --model" in unknown
    assert decode(tmp_path, "--model", "hunyuan_video", source=tmp_path / "in" / "unknown.latent") == 0


def test_a_latent_that_looks_wrong_is_named(tmp_path, capsys):
    _say.cache_clear()  # another test may have been told the same
    save(tmp_path, "a.latent", torch.randn(1, 16, 3, 4, 6))
    assert decode(tmp_path) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.latent: This latent looks scaled" in line


def test_a_scaled_latent_is_decoded_if_the_user_says_so(tmp_path):
    z = latent(t=1)
    save(tmp_path, "a.latent", z * SCALE)
    assert decode(tmp_path, "--scaling", "scaled") == 0
    assert_frames(pictures(tmp_path / "out"), expected(z))


@needs.posix
def test_a_killed_run_continues_and_leaves_nothing_half_written(tmp_path):
    for i in range(12):
        save(tmp_path, f"{i:02d}.latent", latent(t=5))
    words = "decode", tmp_path / "in", "--output", tmp_path / "out", "--device", "cpu", "--format", "frames"
    process = start(*words)
    deadline = time.time() + 120
    while len(list((tmp_path / "out").glob("[0-9]*"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[0-9]*/*.png")}
    folders = {path.parent for path in done}
    assert 2 <= len(folders) < 12
    assert len(done) == 17 * len(folders)  # each folder appears when it is complete
    process = start(*words)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert f"{12 - len(folders)} decoded, {len(folders)} already there, 0 skipped" in out
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert names(tmp_path / "out") == [f"{i:02d}/{i:02d}_{n:05d}.png" for i in range(12) for n in range(17)]


def test_the_memory_does_not_grow_with_the_length(tmp_path):
    peaks = []
    for t in (13, 29):
        save(tmp_path, f"{t}.latent", latent(t=t, h=2, w=2))
        with PeakMemory() as memory:
            assert decode(tmp_path, source=tmp_path / "in" / f"{t}.latent") == 0
        peaks.append(memory.peak)
    frames = 64 * 3 * 16 * 16 * 4  # bytes by which the frames grow
    assert peaks[1] - peaks[0] < frames / 4


def test_results_say_nothing_of_the_machine(tmp_path):
    path = save(tmp_path, "a.latent", latent(t=1))
    assert decode(tmp_path, source=path) == 0
    about = Image.open(tmp_path / "out" / "a.png").info["kvae_made_of"]
    assert set(json.loads(about)) == {"source", "weights", "scaling", "model", "format"}
    assert str(Path(tmp_path).name) not in about


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    for name in "ab":
        save(tmp_path, f"{name}.latent", latent(t=1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device; free some space" in refusal(
        ["decode", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--device", "cpu"], capsys
    )
    assert names(tmp_path / "out") == []
