"""Extraction: every video gets its pair, none is extracted twice, and an error of one clip skips only that clip."""

import errno
import json
import os

import pytest
import torch

import needs
from conftest import make_videos, moving_picture
from kvae_comfyui.kvae import WeightsError, load_kvae, save_kvae
from kvae_comfyui.serving.video_writer import write_video
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data import clips, extract
from kvae_comfyui.training.data.pair_names import PairNames
from kvae_comfyui.training.data.pairs import SUFFIX, Pair, clip_name, find_pairs, read_pair, write_pair
from kvae_comfyui.training.data.videos import Clip, read_clips
from kvae_comfyui.training.vaes import TINY, HunyuanVAE

SIZE = ["--num-frames", "9", "--height", "32", "--width", "32", "--device", "cpu"]


def video(path, seed=0, frames=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving_picture(frames, 32, 32, seed), 25)
    return path


def run(folder, *more):
    return main(
        ["extract", "--videos-root", str(folder / "videos"), "--output-root", str(folder / "latents"), *SIZE, *more]
    )


def pairs_of(folder):
    """The video of each pair, by the pair's name."""
    root = folder / "latents"
    return {clip_name(path, root): read_pair(path).source.video for path in find_pairs(root)}


def test_two_videos_of_one_name_are_two_pairs(tmp_path, capsys):
    for n, name in enumerate(("a/clip.mov", "a/clip.mp4", "a/clip.mov.mp4", "b/clip.mp4", "a/other.mp4")):
        video(tmp_path / "videos" / name, seed=n)
    assert run(tmp_path) == 0
    assert "5 pairs extracted, 0 already there, 0 skipped" in capsys.readouterr().out
    assert pairs_of(tmp_path) == {
        **{f"a/{name}": f"a/{name}" for name in ("clip.mov", "clip.mp4", "clip.mov.mp4")},
        **{f"{name}": f"{name}.mp4" for name in ("b/clip", "a/other")},
    }
    different = {read_pair(path).z_h.numpy().tobytes() for path in find_pairs(tmp_path / "latents")}
    assert len(different) == 5
    assert run(tmp_path, "--mirror", "yes") == 0
    assert "5 pairs extracted, 5 already there, 0 skipped" in capsys.readouterr().out
    (tmp_path / "videos" / "a" / "clip.mov").unlink()  # a new extraction would now use the name clip
    (tmp_path / "videos" / "a" / "clip.mov.mp4").unlink()
    assert run(tmp_path, "--mirror", "yes") == 0
    assert "0 pairs extracted, 6 already there, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["clip.mov", "clip.mp4"])
def test_a_video_added_under_a_taken_name_gets_its_own_pair(tmp_path, capsys, first):
    """The first video was alone, so its pair is clip.safetensors.zst, and keeps that name."""
    (second,) = {"clip.mov", "clip.mp4"} - {first}
    video(tmp_path / "videos" / first, seed=1)
    assert run(tmp_path) == 0
    before = (tmp_path / "latents" / f"clip{SUFFIX}").read_bytes()
    video(tmp_path / "videos" / second, seed=2)
    assert run(tmp_path) == 0
    assert "1 pairs extracted, 1 already there, 0 skipped" in capsys.readouterr().out
    assert pairs_of(tmp_path) == {"clip": first, second: second}
    assert (tmp_path / "latents" / f"clip{SUFFIX}").read_bytes() == before
    (tmp_path / "videos" / first).unlink()  # now the second is alone, but the pair of the first has the name clip
    assert run(tmp_path) == 0
    assert "0 pairs extracted, 1 already there, 0 skipped" in capsys.readouterr().out
    assert pairs_of(tmp_path) == {"clip": first, second: second}


def test_names_are_distinct_if_capitals_or_endings_clash(tmp_path):
    files = ["Clip.mp4", "clip.mov", "x.mp4", "x.mirrored.mp4", "y.000.mp4", "y.mp4", "e\u0301.mp4", "\u00e9.mov"]
    names = PairNames(tmp_path, tmp_path / "out", [tmp_path / file for file in files], windows=False)
    placed = {file: names.place(tmp_path / file, "") for file in files}
    assert not any(there for _, there in placed.values())
    of = {file: path.name[: -len(SUFFIX)] for file, (path, _) in placed.items()}
    kept = {"y.000.mp4": "y.000", "y.mp4": "y"}
    assert of == {file: kept.get(file, file) for file in files}
    again = PairNames(tmp_path, tmp_path / "out", [tmp_path / file for file in reversed(files)], windows=False)
    assert {file: again.place(tmp_path / file, "") for file in files} == placed


def scaled_kvae(path, factor):
    kvae = load_kvae(TINY["kvae"])
    kvae.encoder.conv_out.conv.weight.data.mul_(factor)
    save_kvae(path, kvae, torch.float32, {})
    return str(path)


def test_latents_that_are_not_finite_in_float16_are_not_written(tmp_path, capsys):
    """A VAE that encodes every clip to such latents is refused at the end, and leaves no file."""
    make_videos(tmp_path / "videos", 2, frames=9, height=32, width=32)
    assert run(tmp_path, "--kvae", scaled_kvae(tmp_path / "loud.safetensors", 1e8)) == 2
    err = capsys.readouterr().err
    assert err.count("z_k holds values that are not finite numbers in float16; not written") == 2
    assert "none of the 2 videos gave a pair" in err
    assert not list((tmp_path / "latents").rglob("*"))
    assert run(tmp_path) == 0
    assert "2 pairs extracted, 0 already there, 0 skipped" in capsys.readouterr().out


def test_a_pair_that_cannot_be_read_is_extracted_again(tmp_path, capsys):
    make_videos(tmp_path / "videos", 2, frames=9, height=32, width=32)
    assert run(tmp_path) == 0
    first, _ = find_pairs(tmp_path / "latents")
    first.write_bytes(b"no pair")
    assert run(tmp_path) == 0
    assert "1 pairs extracted, 1 already there, 0 skipped" in capsys.readouterr().out
    assert read_pair(first).source.video == "v_Wave_g01_c01.mp4"


@pytest.mark.parametrize("where", ["reading", "encoding", "writing"])
def test_an_unforeseen_error_skips_its_clip_and_no_other(tmp_path, capsys, monkeypatch, where):
    make_videos(tmp_path / "videos", 4, frames=9, height=32, width=32)
    bad = "v_Wave_g02_c01"
    marked = read_clip_of(tmp_path / "videos" / f"{bad}.mp4")

    def failing(real, is_bad):
        def call(*args):
            if is_bad(*args):
                raise AssertionError("never seen before")
            return real(*args)

        return call

    if where == "reading":
        monkeypatch.setattr(clips, "read_clips", failing(read_clips, lambda windows, *_: bad in str(windows[0])))
    elif where == "encoding":
        seen = failing(HunyuanVAE.encode, lambda _, x, *rest: any(torch.equal(each, marked) for each in x))
        monkeypatch.setattr(HunyuanVAE, "encode", seen)
    else:
        monkeypatch.setattr(extract, "write_pair", failing(extract.write_pair, lambda path, pair: bad in str(path)))
    assert run(tmp_path, "--batch-size", "3") == 1
    captured = capsys.readouterr()
    assert "3 pairs extracted, 0 already there, 1 skipped" in captured.out
    assert f"{bad}.mp4: AssertionError: never seen before" in captured.err
    assert list(json.loads((tmp_path / "latents" / "manifest.json").read_text())["failed"]) == [f"{bad}.mp4"]
    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert "1 pairs extracted, 3 already there, 0 skipped" in capsys.readouterr().out


def read_clip_of(path):
    (frames,) = read_clips([Clip(path, 9, 0)], 32, 32)
    return frames


@needs.posix
def test_names_that_are_not_utf_8_are_extracted_and_too_long_names_are_reported(tmp_path, capsys):
    make_videos(tmp_path / "videos", 1, frames=9, height=32, width=32)
    videos = os.fsencode(tmp_path / "videos")
    data = (tmp_path / "videos" / "v_Wave_g01_c01.mp4").read_bytes()
    names = {b"caf\xe9.mp4": data, b"no\xffvideo.mp4": b"none", b"n" * 246 + b".mp4": data}
    for name, content in names.items():
        with open(os.path.join(videos, name), "wb") as file:
            file.write(content)
    assert run(tmp_path) == 1
    captured = capsys.readouterr()
    assert "2 pairs extracted, 0 already there, 2 skipped" in captured.out
    assert "File name too long" in captured.err and "not a video" in captured.err
    failed = json.loads((tmp_path / "latents" / "manifest.json").read_text())["failed"]
    assert {os.fsencode(name) for name in failed} == {b"no\xffvideo.mp4", b"n" * 246 + b".mp4"}
    assert sorted(map(os.fsencode, pairs_of(tmp_path).values())) == [b"caf\xe9.mp4", b"v_Wave_g01_c01.mp4"]
    assert run(tmp_path) == 1
    assert "0 pairs extracted, 2 already there, 2 skipped" in capsys.readouterr().out


def test_a_failed_extraction_does_not_lock_its_folder(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_text("no video")
    assert run(tmp_path) == 2
    assert "none of the 1 videos gave a pair" in capsys.readouterr().err
    assert not list((tmp_path / "latents").rglob("*"))
    vae = {"space": "a", "sha256": "b"}
    manifest = {"settings": {"height": 8}, "hunyuan_vae": vae, "kvae": vae}
    (tmp_path / "latents").mkdir(exist_ok=True)
    (tmp_path / "latents" / "manifest.json").write_text(json.dumps(manifest))  # as earlier versions left it
    video(tmp_path / "videos" / "a.mp4")
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["settings"]["height"] == 32


def test_pairs_that_do_not_say_how_they_were_made_are_not_mixed_with_new_pairs(tmp_path, capsys):
    video(tmp_path / "videos" / "a.mp4")
    z = torch.zeros(16, 3, 4, 4)
    write_pair(tmp_path / "latents" / f"a{SUFFIX}", Pair(z, z, None))
    assert run(tmp_path) == 2
    assert "does not say how they were made; choose another --output-root" in capsys.readouterr().err
    assert not (tmp_path / "latents" / "manifest.json").exists()


def test_a_full_disk_ends_the_run_and_a_bad_name_does_not():
    def failed(number):
        error = WeightsError("not written")
        error.__context__ = OSError(number, os.strerror(number))
        return error

    assert extract.is_disk_error(failed(errno.ENOSPC)) and extract.is_disk_error(failed(errno.EIO))
    assert not extract.is_disk_error(failed(errno.ENAMETOOLONG)) and not extract.is_disk_error(ValueError())
