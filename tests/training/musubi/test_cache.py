"""`cache` keeps what fits, refuses to lose anything, continues where it stopped, and says what it will do."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from command import refusal, start
from encoder_files import hunyuan_options
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.musubi.encoders import WholeClips, pixels
from kvae_comfyui.training.musubi.frames import read_windows
from kvae_comfyui.training.musubi.windows import Window
from kvae_comfyui.training.vaes import load_hunyuan_vae
from musubi_media import clip, frame_folder, picture, write_config, write_jsonl

pytest.importorskip("cv2", reason="needs cv2: install requirements-training.txt")


def dataset(folder, **settings):
    """A config of one dataset of two videos; the second has two windows."""
    if not (folder / "v").exists():
        clip(folder / "v" / "a.mp4", 5), clip(folder / "v" / "b.mp4", 11)
    places = {"video_directory": str(folder / "v"), "cache_directory": str(folder / "c")}
    places |= {"target_frames": [5], "frame_extraction": "chunk", "caption_extension": ".txt"}
    return write_config(folder / "a.json", places | settings, resolution=[64, 48])


def argv(config, *options, architecture="hunyuan_video"):
    return [
        "cache", "--dataset-config", str(config), "--architecture", architecture, "--device", "cpu", *map(str, options)
    ]  # fmt: skip


def caches(folder, name="c"):
    """The caches of a folder: their bytes and when they were written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / name).glob("*.safetensors")}


NAMES = {f"{each}_0064x0048_hv.safetensors" for each in ("a_00000-005", "b_00000-005", "b_00005-005")}


@torch.inference_mode()
def test_the_models_own_vae_sees_whole_clips():
    """41 frames have 11 latents: those of the encoder without any tiles, which diffusers' own `encode` has not."""
    frames = [np.random.default_rng(n).integers(0, 256, (16, 24, 3), np.uint8) for n in range(41)]
    plain = load_hunyuan_vae("tiny", "cpu", temporal_tiles=True).vae
    x = pixels(frames, 16, 24)
    whole = plain.quant_conv(plain.encoder(x))[0, :16]
    z = WholeClips(load_hunyuan_vae("tiny", "cpu")).encode(frames, 16, 24, None)
    assert z.shape == (16, 11, 2, 3)
    torch.testing.assert_close(z, whole, atol=1e-5, rtol=1e-5)
    assert (plain.encode(x).latent_dist.mode()[0] - whole).abs().max() > 0.01


@torch.inference_mode()
def test_hunyuan_video_15_sees_whole_clips(tmp_path):
    """As diffusers does, whose attention has a mask."""
    path = hunyuan_options(tmp_path, "hunyuan_video_1.5")[1]
    frames = [np.random.default_rng(n).integers(0, 256, (32, 48, 3), np.uint8) for n in range(21)]
    plain = load_hunyuan_vae(path, "cpu", temporal_tiles=True).vae
    whole = plain.encode(pixels(frames, 32, 48)).latent_dist.mode()[0]
    z = WholeClips(load_hunyuan_vae(path, "cpu")).encode(frames, 32, 48, None)
    assert z.shape == (32, 6, 2, 3)
    torch.testing.assert_close(z, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["hunyuan", "kvae"])
def test_a_cache_holds_raw_latents_and_says_what_made_it(encoder, tmp_path, capsys):
    config = dataset(tmp_path)
    assert main(argv(config, "--encoder", encoder)) == 0
    assert caches(tmp_path).keys() == NAMES
    path = tmp_path / "c" / "b_00005-005_0064x0048_hv.safetensors"
    said = Weights(path).metadata
    assert (said["architecture"], said["width"], said["height"], said["frame_count"]) == (
        "hunyuan_video", "64", "48", "5",
    )  # fmt: skip
    assert said["kvae_encoder"] == encoder and said["kvae_source"] == "b.mp4" and len(said["kvae_vae_sha256"]) == 64
    assert (len(said["kvae_adapter_sha256"]) == 64) == (encoder == "kvae")
    assert list(load_file(path)) == ["latents_2x6x8_float16"]
    assert load_latent(path).z.shape == (1, 16, 2, 6, 8)
    assert str(tmp_path) not in str(said)  # people share these files
    assert "3 caches made, 0 already there" in capsys.readouterr().out


def test_a_sample_has_a_seed_of_its_own_and_is_the_same_in_every_run(tmp_path):
    config = dataset(tmp_path)
    assert main(argv(config)) == 0
    first = caches(tmp_path)
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    assert main(argv(config)) == 0
    assert {name: data for name, (data, _) in caches(tmp_path).items()} == {n: data for n, (data, _) in first.items()}
    window = Window(0, 5)
    _, frames = next(read_windows(str(tmp_path / "v" / "a.mp4"), range(5), [window], (64, 48)))
    mode = load_hunyuan_vae("tiny", "cpu").encode_unit(pixels(frames, 48, 64))[0]
    z = load_file(tmp_path / "c" / "a_00000-005_0064x0048_hv.safetensors")["latents_2x6x8_float16"].float()
    assert 1e-4 < (z - mode).std() < 0.5 * mode.std()


def test_what_fits_is_kept_and_what_is_missing_is_made(tmp_path, capsys):
    config = dataset(tmp_path)
    assert main(argv(config)) == 0
    before = caches(tmp_path)
    (tmp_path / "c" / "b_00000-005_0064x0048_hv.safetensors").unlink()
    (tmp_path / "c" / "a_00000-005_0064x0048_hv.safetensors").write_bytes(b"cut short")
    capsys.readouterr()
    assert main(argv(config)) == 0
    assert "2 caches made, 1 already there" in capsys.readouterr().out
    after = caches(tmp_path)
    kept = "b_00005-005_0064x0048_hv.safetensors"
    assert after[kept] == before[kept]
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}


OTHERWISE = {
    "another encoder": (["--encoder", "kvae"], {}, "kvae_encoder is hunyuan, not kvae"),
    "another size of latents": ([], {"enable_bucket": True}, "a_00000-005"),
    "another frame rate": ([], {"source_fps": 24.0}, "kvae_source_fps is , not 24.0"),
}


@pytest.mark.parametrize("other", OTHERWISE)
def test_caches_that_were_made_otherwise_are_replaced_only_if_asked(other, tmp_path, capsys):
    options, settings, words = OTHERWISE[other]
    assert main(argv(dataset(tmp_path))) == 0
    before = caches(tmp_path)
    config = dataset(tmp_path, **settings)
    if other == "another size of latents":  # a name that an image keeps, whatever the resolution
        picture(tmp_path / "i" / "a_00000-005.png", 48, 64)
        places = {"image_directory": str(tmp_path / "i"), "cache_directory": str(tmp_path / "c")}
        config = write_config(tmp_path / "a.json", places, resolution=[96, 96], caption_extension=".txt")
    error = refusal(argv(config, *options), capsys)
    assert "--replace" in error
    assert words in error
    assert caches(tmp_path) == before
    assert main(argv(config, *options, "--replace")) == 0
    assert caches(tmp_path) != before
    assert main(argv(config, *options)) == 0


def test_a_cache_of_another_program_is_not_overwritten(tmp_path, capsys):
    assert main(argv(dataset(tmp_path))) == 0
    path = next((tmp_path / "c").iterdir())
    save_file(load_file(path), path, {"architecture": "hunyuan_video"})
    before = caches(tmp_path)
    assert "another program made it" in refusal(argv(dataset(tmp_path)), capsys)
    assert caches(tmp_path) == before


def test_a_dry_run_says_all_and_does_nothing(tmp_path, capsys):
    config = dataset(tmp_path, target_frames=[9], source_fps=30.0)
    clip(tmp_path / "v" / "a.mkv", 20)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old_00000-005_0064x0048_hv.safetensors").write_bytes(b"stale")
    (tmp_path / "c" / "old_hv_te.safetensors").write_bytes(b"text")
    (tmp_path / "v" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "v" / "broken.txt").write_text("a caption")
    before = caches(tmp_path)
    assert main(argv(config, "--dry-run")) == 1
    out, err = capsys.readouterr()
    assert caches(tmp_path) == before
    for words in (
        "4 videos in", "windows per clip: 0 (2x), 1 (1x)", "too short for 9 frames after 30.0 was fitted",
        "a.mp4 has 4", "64x48x9 (1x)", "caches to make: 1, ", "stale, kept", "1: old_00000-005",
        "one text cache for several media of one name",
    ):  # fmt: skip
        assert words in out, words
    assert "skipped: " in err and "broken.mp4" in err


def test_stale_caches_are_deleted_only_if_asked_and_never_those_of_a_clip_that_cannot_be_read(tmp_path):
    config = dataset(tmp_path)
    assert main(argv(config)) == 0
    (tmp_path / "v" / "b.mp4").write_bytes(b"no video")
    stale = tmp_path / "c" / "old_00000-005_0064x0048_hv.safetensors"
    others = [tmp_path / "c" / name for name in ("old_00000-005_0064x0048_hv15.safetensors", "x_hv_te.safetensors")]
    for path in (stale, *others):
        path.write_bytes(b"a cache")
    assert main(argv(config)) == 1
    assert stale.exists()
    assert main(argv(config, "--delete-stale")) == 1
    assert not stale.exists()
    assert {path.name for path in (tmp_path / "c").iterdir()} == NAMES | {path.name for path in others}


def test_of_two_media_with_one_name_the_later_one_is_cached(tmp_path, capsys):
    media = [clip(tmp_path / name / "a.mp4", frames) for name, frames in (("x", 5), ("w", 9))]
    write_jsonl(tmp_path / "v.jsonl", "video", media)
    places = {"video_jsonl_file": str(tmp_path / "v.jsonl"), "cache_directory": str(tmp_path / "c")}
    config = write_config(tmp_path / "a.json", places | {"target_frames": [5]}, resolution=[64, 48])
    assert main(argv(config)) == 0
    assert "collision: " in capsys.readouterr().out
    (path,) = (tmp_path / "c").iterdir()
    assert Weights(path).metadata["kvae_source_bytes"] == str(media[1].stat().st_size)


def test_a_clip_that_breaks_off_is_named_at_the_end_and_the_others_are_cached(tmp_path, capsys):
    config = dataset(tmp_path)
    frames = frame_folder(tmp_path / "v" / "c.mp4", 10)
    (tmp_path / "v" / "c.txt").write_text("a caption")
    (frames / "007.png").write_bytes(b"no picture")
    assert main(argv(config)) == 1
    out, err = capsys.readouterr()
    assert "4 caches made, 0 already there, 1 media skipped" in out
    assert "skipped: " in err and "007.png: not an image that can be read" in err


def test_windows_share_their_frames_and_no_frame_is_held_longer_than_needed(tmp_path):
    path = str(clip(tmp_path / "a.mp4", 40))
    windows = [Window(0, 9), Window(4, 9), Window(30, 5)]
    read = dict(read_windows(path, range(0, 40), windows, (64, 48)))
    assert [len(frames) for frames in read.values()] == [9, 9, 5]
    assert all(a is b for a, b in zip(read[windows[0]][4:], read[windows[1]][:5], strict=True))
    reader = read_windows(path, range(0, 40), windows, (64, 48))
    for _ in range(3):
        next(reader)
    assert sorted(reader.gi_frame.f_locals["held"]) == [*range(30, 35)]


@needs.posix
def test_a_killed_run_leaves_whole_files_and_the_next_one_continues(tmp_path):
    config = dataset(tmp_path, target_frames=[1], frame_extraction="slide")
    clip(tmp_path / "v" / "c.mp4", 24)
    process = start(*argv(config))
    folder: Path = tmp_path / "c"
    until = time.monotonic() + 60
    while len(list(folder.glob("*.safetensors"))) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert 4 <= len(there) < 40
    assert all(load_file(path) for path in there)
    assert main(argv(config)) == 0
    assert len(list(folder.iterdir())) == 40
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in there.items())
