"""Reading videos: which frames, which size, which files are refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import make_videos, moving_picture
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.evaluate import psnr
from kvae_comfyui.training.videos import (
    Clip,
    count_frames,
    cut,
    find_videos,
    frame_rate,
    read_clip,
    read_clips,
    resize,
    write_video,
)


def test_written_videos_read_back(tmp_path):
    frames = moving_picture(9, 48, 64)
    write_video(tmp_path / "a.mp4", frames, 12)
    assert frame_rate(tmp_path / "a.mp4") == 12
    assert count_frames(tmp_path / "a.mp4") == 9
    back = read_clip(Clip(tmp_path / "a.mp4", 33, 0), 48, 64)
    assert back.shape == frames.shape and back.dtype == torch.uint8
    assert psnr(back.float(), frames.float()) > 27  # chroma is subsampled
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_consecutive_and_uniform(tmp_path):
    """Frame i of this video is grey of value 5i."""
    frames = (5 * torch.arange(40)).byte().view(1, 40, 1, 1).expand(3, 40, 48, 64)
    write_video(tmp_path / "a.mp4", frames, 25)

    def indices(clip):
        return (read_clip(clip, 48, 64).float().mean((0, 2, 3)) / 5).round().int().tolist()

    assert indices(Clip(tmp_path / "a.mp4", 9, 7)) == list(range(7, 16))
    assert indices(Clip(tmp_path / "a.mp4", 9, None)) == np.linspace(0, 39, 9).astype(int).tolist()
    assert indices(Clip(tmp_path / "a.mp4", 100, None)) == list(range(40))


def test_windows_of_one_decode_are_those_of_many(tmp_path):
    (video,) = make_videos(tmp_path, 1, frames=40)
    clips = cut(video, 9, 3)
    together = list(read_clips(clips, 24, 32))
    for clip, frames in zip(clips, together, strict=True):
        assert torch.equal(frames, read_clip(clip, 24, 32))
    assert not torch.equal(together[0], together[1])


def test_windows_do_not_overlap(tmp_path):
    (video,) = make_videos(tmp_path, 1, frames=40)
    assert [c.first for c in cut(video, 9, 1)] == [0]
    starts = [c.first for c in cut(video, 9, 10)]
    assert len(starts) == 4 and starts[0] == 0 and starts[-1] == 31
    assert all(b - a >= 9 for a, b in pairwise(starts))


def test_resize_keeps_the_mean_and_the_colours():
    x = moving_picture(2, 96, 128)
    y = resize(x, 24, 40)
    assert y.shape == (3, 2, 24, 40)
    torch.testing.assert_close(y.float().mean((1, 2, 3)), x.float().mean((1, 2, 3)), rtol=0.02, atol=1)


def test_what_is_not_a_video(tmp_path):
    (video,) = make_videos(tmp_path / "v", 1, frames=20)
    (tmp_path / "text.avi").write_text("this is not a video")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:200])
    write_video(tmp_path / "whole.avi", moving_picture(40, 96, 128), 25)
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(data[: len(data) * 6 // 10])
    write_video(tmp_path / "short.mp4", moving_picture(4, 48, 64), 25)
    for name, message in (
        ("text.avi", "not a video"),
        ("cut.mp4", "not a video"),
        ("half.avi", "cut short, .* of its 40 frames decode"),
        ("short.mp4", "only 4 frames decode; expected at least 5"),
        ("absent.mp4", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_clip(Clip(tmp_path / name, 33, 0), 48, 64)
        assert name in str(error.value)


def test_finding(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_videos(tmp_path / "absent")
    with pytest.raises(UserError, match="no videos in it"):
        find_videos(tmp_path)
    for name in ("b/v_X_g09_c01.AVI", "a/v_X_g03_c01.mp4", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in find_videos(tmp_path)] == ["v_X_g03_c01.mp4", "v_X_g09_c01.AVI"]


def test_ucf101_splits(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    def split(part):
        return [p.stem for p in find_videos(tmp_path, part)]

    touch("A/v_A_g07_c01.avi", "A/v_A_g08_c01.avi")
    assert (split("test"), split("train")) == (["v_A_g07_c01"], ["v_A_g08_c01"])  # by group number
    touch("train/A/x.avi", "val/A/y.avi")
    assert (split("test"), split("train")) == (["y"], ["x"])  # by folder
    (tmp_path / "trainlist01.txt").write_text("A/v_A_g07_c01.avi 1\n")
    assert split("train") == ["v_A_g07_c01"]  # by the official list
    with pytest.raises(UserError, match="no test split found"):
        find_videos(tmp_path / "train", "test")
