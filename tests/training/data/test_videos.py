"""Videos are found by split, cut into windows and read at a size; files that are not videos are refused."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import make_videos, moving_picture
from kvae_comfyui.serving.metrics import psnr
from kvae_comfyui.serving.video_writer import write_video
from kvae_comfyui.training.data.videos import Clip, count_frames, cut, find_videos, read_clip, read_clips, times_of
from kvae_comfyui.training.errors import UserError
from made_videos import greys, make, which


def test_a_written_video_reads_back(tmp_path):
    frames = moving_picture(9, 48, 64)
    write_video(tmp_path / "a.mp4", frames, 12)
    assert times_of(Clip(tmp_path / "a.mp4", 33, 0)) == [Fraction(i, 12) for i in range(9)]
    assert count_frames(tmp_path / "a.mp4") == 9
    back = read_clip(Clip(tmp_path / "a.mp4", 33, 0), 48, 64)
    assert back.shape == frames.shape and back.dtype == torch.uint8
    assert psnr(back.float(), frames.float()) > 27  # chroma is subsampled
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_are_consecutive_or_uniformly_spaced(tmp_path):
    """Frame i of this video is grey of value 5i."""
    frames = (5 * torch.arange(40)).byte().view(1, 40, 1, 1).expand(3, 40, 48, 64)
    write_video(tmp_path / "a.mp4", frames, 25)

    def indices(clip):
        return (read_clip(clip, 48, 64).float().mean((0, 2, 3)) / 5).round().int().tolist()

    assert indices(Clip(tmp_path / "a.mp4", 9, 7)) == list(range(7, 16))
    assert indices(Clip(tmp_path / "a.mp4", 9, None)) == np.linspace(0, 39, 9).astype(int).tolist()
    assert indices(Clip(tmp_path / "a.mp4", 100, None)) == list(range(40))


def test_windows_read_together_equal_windows_read_alone(tmp_path):
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


def test_files_that_are_not_whole_videos_are_refused(tmp_path):
    (video,) = make_videos(tmp_path / "v", 1, frames=20)
    (tmp_path / "text.avi").write_text("this is not a video")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:200])
    make(tmp_path / "whole.avi", moving_picture(40, 96, 128).permute(1, 2, 3, 0).numpy())
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(data[: len(data) * 6 // 10])
    write_video(tmp_path / "short.mp4", moving_picture(4, 48, 64), 25)
    for name, message in (
        ("text.avi", "not a video"),
        ("cut.mp4", "has no video stream"),
        ("half.avi", "cut short, it ends after .* of 1.60 seconds"),
        ("short.mp4", "only 4 frames decode; expected at least 5"),
        ("absent.mp4", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_clip(Clip(tmp_path / name, 33, 0), 48, 64)
        assert name in str(error.value)


def test_videos_are_found_by_their_extension(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_videos(tmp_path / "absent")
    with pytest.raises(UserError, match="no videos in it"):
        find_videos(tmp_path)
    for name in ("b/v_X_g09_c01.AVI", "a/v_X_g03_c01.mp4", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in find_videos(tmp_path)] == ["v_X_g03_c01.mp4", "v_X_g09_c01.AVI"]


def test_a_split_follows_the_list_the_folder_or_the_group_number(tmp_path):
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


def test_a_list_of_a_split_names_copies_with_another_extension(tmp_path):
    videos = tmp_path / "videos"
    for name in ("A/v_A_g08_c01.mp4", "A/v_A_g09_c01.mp4", "A/v_A_g01_c01.mp4"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).touch()
    (videos / "trainlist01.txt").write_bytes("A/v_A_g08_c01.avi 1\nB/caf\xe9.avi 2\n".encode("latin-1"))
    assert [path.name for path in find_videos(videos, "train")] == ["v_A_g08_c01.mp4"]
    (videos / "testlist01.txt").write_text(
        "A/v_Other_g01_c01.avi\n"
    )  # a list of other videos: the group numbers decide
    assert [path.name for path in find_videos(videos, "test")] == ["v_A_g01_c01.mp4"]


def test_folders_of_a_split_are_found_at_any_depth(tmp_path):
    for name in ("UCF101_subset/train/A/x.mp4", "UCF101_subset/val/A/y.mp4", "UCF101_subset/test/A/z.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.stem for path in find_videos(tmp_path, "train")] == ["x"]
    assert [path.stem for path in find_videos(tmp_path, "test")] == [
        "z"
    ]  # val is not the test split if there is a folder test
    (tmp_path / "UCF101_subset/test/A/z.mp4").unlink()
    assert [path.stem for path in find_videos(tmp_path, "test")] == ["y"]


def test_videos_behind_links_are_found_once(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.mp4").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "b.mp4").touch()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)  # a loop
    (root / "dead.mp4").symlink_to(tmp_path / "nothing.mp4")
    assert find_videos(root) == [root / "b.mp4", root / "linked" / "deep" / "a.mp4"]


def test_windows_are_cut_from_the_frames_that_are_shown(tmp_path):
    """An AVI whose header announces three frames for each frame that it has."""
    path = make(tmp_path / "a.avi", greys(20), "mjpeg", "yuvj420p", times=range(0, 60, 3))
    clips = cut(path, 9, 4)
    assert [clip.first for clip in clips] == [0, 11]
    for clip, frames in zip(clips, read_clips(clips, 48, 64), strict=True):
        assert which(frames.permute(1, 2, 3, 0).numpy()) == list(range(clip.first, clip.first + 9))
    uniform = read_clip(Clip(path, 10, None), 48, 64)
    assert which(uniform.permute(1, 2, 3, 0).numpy()) == np.linspace(0, 19, 10).astype(int).tolist()
    assert times_of(clips[1]) == [Fraction(3 * i, 25) for i in range(9)]
