"""The command `extract`, from videos to pairs: its options, and what is left when it is killed or the disk is full."""

import json
import signal
import time
from dataclasses import replace
from functools import partial

import torch

import needs
from command import start
from conftest import make_videos
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import find_pairs, read_pair
from kvae_comfyui.training.evaluate.originals import original_frames
from kvae_comfyui.training.vaes import load_hunyuan_vae


def extract(folder, *more, out="latents"):
    """The words of the command for the videos of a folder."""
    return [
        *("extract", "--videos-root", str(folder / "videos"), "--output-root", str(folder / out), "--device", "cpu"),
        *("--num-frames", "9", "--height", "48", "--width", "64", *more),
    ]


def test_extract_adds_mirror_images(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=18)
    assert main(extract(tmp_path, "--clips-per-video", "2")) == 0
    assert main(extract(tmp_path, "--clips-per-video", "2", "--mirror", "yes")) == 0
    assert "2 pairs extracted, 2 already there, 0 skipped" in capsys.readouterr().out
    pairs = {path.name.split(".", 1)[1]: read_pair(path) for path in find_pairs(tmp_path / "latents")}
    assert set(pairs) == {f"{n}{end}.safetensors.zst" for n in ("000", "001") for end in ("", ".mirrored")}
    plain, mirrored = pairs["001.safetensors.zst"], pairs["001.mirrored.safetensors.zst"]
    assert mirrored.source == replace(plain.source, mirrored=True)
    videos = str(tmp_path / "videos")
    frames = original_frames("", mirrored, videos)
    assert torch.equal(frames, original_frames("", plain, videos).flip(-1))
    z_h = load_hunyuan_vae("tiny", "cpu").encode(frames[None])[0]
    torch.testing.assert_close(mirrored.z_h.float(), z_h, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(mirrored.z_h, plain.z_h, rtol=0.1, atol=0.1)


def test_extract_skips_broken_clips_and_says_so(tmp_path, capsys):
    make_videos(tmp_path / "videos", 2)
    (tmp_path / "videos" / "a.avi").write_text("no video")
    assert main(extract(tmp_path)) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("2 pairs extracted, 0 already there, 1 skipped")
    assert captured.err.count("a.avi: not a video") == 1
    assert "not a video" in json.loads((tmp_path / "latents" / "manifest.json").read_text())["failed"]["a.avi"]


def test_a_short_video_is_padded_and_says_so(tmp_path):
    make_videos(tmp_path / "videos", 1, frames=7)
    assert main(extract(tmp_path)) == 0
    source = read_pair(find_pairs(tmp_path / "latents")[0]).source
    assert (source.frames, source.padded) == (7, 2)


def test_posterior_samples_differ_from_the_mode_and_are_reproducible(tmp_path):
    make_videos(tmp_path / "videos", 2)
    for name in ("mode", "sample", "again"):
        mode = "mode" if name == "mode" else "sample"
        assert main(extract(tmp_path, "--posterior", mode, out=name)) == 0
    mode, sample, again = (read_pair(find_pairs(tmp_path / n)[0]) for n in ("mode", "sample", "again"))
    assert not torch.equal(sample.z_h, mode.z_h) and not torch.equal(sample.z_k, mode.z_k)
    assert torch.equal(sample.z_h, again.z_h)


@needs.posix
def test_a_killed_extraction_continues(tmp_path):
    make_videos(tmp_path / "videos", 30)
    process = start(*extract(tmp_path))
    deadline = time.time() + 120
    while len(list((tmp_path / "latents").glob("*.zst"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = find_pairs(tmp_path / "latents")
    assert 2 <= len(done) < 30
    assert all(read_pair(path).z_h.shape == (16, 3, 6, 8) for path in done)
    process = start(*extract(tmp_path))
    out, _ = process.communicate()
    assert process.returncode == 0
    assert f"{30 - len(done)} pairs extracted, {len(done)} already there, 0 skipped" in out


@needs.posix
def test_ctrl_c_and_a_full_disk_end_in_one_line(tmp_path):
    make_videos(tmp_path / "videos", 30)
    # a background job of a shell ignores Ctrl-C, and so do its children
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(*extract(tmp_path), preexec_fn=heed)
    deadline = time.time() + 120
    while not list((tmp_path / "latents").glob("*.zst")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; the same command continues from what is saved"
    assert "Traceback" not in err

    import resource  # POSIX only

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # the manifest fits, a pair does not

    process = start(*extract(tmp_path, out="full"), preexec_fn=no_room)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not list((tmp_path / "full").iterdir())  # no pair, no manifest
