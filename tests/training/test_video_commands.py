"""Commands on videos: the size of clips, the times of frames, and impossible sizes."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kvae_comfyui.serving.fit import CROP, STRETCH
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import find_pairs, read_pair
from kvae_comfyui.training.data.videos import Clip, read_clip, times_of
from kvae_comfyui.training.vaes import load_kvae_for_training
from made_videos import make, picture

SIZE = ["--num-frames", "9", "--height", "32", "--width", "48", "--device", "cpu"]


def moving(count: int, height: int = 48, width: int = 128) -> list[np.ndarray]:
    return [np.roll(picture(height, width), 2 * n, axis=1) for n in range(count)]


@pytest.fixture
def wide(tmp_path) -> Path:
    """A folder with a video nearly twice as wide as the clips that the tests extract."""
    make(tmp_path / "videos" / "a.mp4", moving(12))
    return tmp_path


def extract(folder: Path, *options: str, out: str = "pairs") -> int:
    roots = ["--videos-root", str(folder / "videos"), "--output-root", str(folder / out)]
    return main(["extract", *roots, *SIZE, *options])


def latent(folder: Path, fit: str) -> torch.Tensor:
    frames = read_clip(Clip(folder / "videos" / "a.mp4", 9, 0), 32, 48, fit)
    return load_kvae_for_training("tiny", "cpu").encode(frames[None])[0].half().cpu()


@pytest.mark.parametrize("fit", [CROP, STRETCH])
def test_clips_are_cropped_or_stretched_and_pairs_record_it(wide, fit):
    assert extract(wide, "--fit", fit) == 0
    (path,) = find_pairs(wide / "pairs")
    pair = read_pair(path)
    assert pair.source and pair.source.fit == fit
    torch.testing.assert_close(pair.z_k, latent(wide, fit))
    assert not torch.equal(latent(wide, CROP), latent(wide, STRETCH))


def test_a_new_folder_crops_and_an_old_folder_keeps_its_fit(wide, capsys):
    assert extract(wide) == 0
    (path,) = find_pairs(wide / "pairs")
    assert read_pair(path).source.fit == CROP
    assert extract(wide, "--fit", "stretch") == 2
    assert "made with other settings" in capsys.readouterr().err

    assert extract(wide, "--fit", "stretch", out="old") == 0
    manifest = json.loads((wide / "old" / "manifest.json").read_text())
    assert "fit" not in manifest["settings"]  # as in versions that had no choice
    make(wide / "videos" / "b.mp4", moving(12))
    assert extract(wide, out="old") == 0
    assert {read_pair(path).source.fit for path in find_pairs(wide / "old")} == {STRETCH}
    assert "1 pairs extracted, 1 already there" in capsys.readouterr().out


def reconstruct(video: Path, out: Path, *options: str) -> int:
    return main(["reconstruct", "--video-path", str(video), *SIZE, "--output", str(out), *options])


@pytest.mark.parametrize(
    ("rate", "ticks"),
    [
        (Fraction(24000, 1001), range(12)),
        (Fraction(1, 5), range(12)),
        (25, [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38]),
    ],
    ids=["film", "timelapse", "variable"],
)
def test_a_reconstruction_is_shown_at_the_times_of_the_original(tmp_path, rate, ticks):
    video = make(tmp_path / "a.mp4", moving(12), rate=rate, times=list(ticks))
    assert reconstruct(video, tmp_path / "out.mp4") == 0
    assert times_of(Clip(tmp_path / "out.mp4", 9, 0)) == [tick / Fraction(rate) for tick in list(ticks)[:9]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "out.json", "out.mp4"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--height", "0"), ("--height", "-8"), ("--height", "1048576"), ("--width", "16384"), ("--num-frames", "-3"),
     ("--num-frames", "4"), ("--num-frames", "99999999999")],
)  # fmt: skip
def test_an_impossible_size_is_refused_before_anything_is_read(tmp_path, capsys, option, value):
    assert reconstruct(tmp_path / "absent.mp4", tmp_path / "out.mp4", option, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{option} is" in line and "expected" in line
