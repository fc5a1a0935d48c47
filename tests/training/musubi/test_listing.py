"""Dataset configs, the media that they name, buckets and windows follow musubi-tuner's rules."""

import itertools
from dataclasses import replace

import pytest

from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.musubi.buckets import bucket_chooser, buckets_of
from kvae_comfyui.training.musubi.config import Dataset, read_config
from kvae_comfyui.training.musubi.items import find_items
from kvae_comfyui.training.musubi.windows import Window, used_frames, windows_of
from musubi_media import captioned, frame_folder, picture, write_config, write_jsonl

VIDEO = {"video_directory": "v", "caption_extension": ".txt"}


def dataset(tmp_path, **settings) -> Dataset:
    (made,) = read_config(write_config(tmp_path / "a.json", VIDEO | settings))
    return made


def test_a_value_of_a_dataset_wins_over_general_and_general_over_the_default(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("""
[general]
resolution = 512
enable_bucket = true
caption_extension = ".cap"
[[datasets]]
video_directory = "v"
resolution = [640, 352]
batch_size = 0
[[datasets]]
image_directory = "i"
image_jsonl_file = "i.jsonl"
cache_directory = "c"
bucket_no_upscale = true
multiple_target = false
fp_1f_clean_indices = [0, 1]
control_resolution = [64, 64]
flux_kontext_no_resize_control = true
""")
    video, image = read_config(path)
    assert (video.kind, video.resolution, video.enable_bucket, video.caption_extension) == (
        "video", (640, 352), True, ".cap",
    )  # fmt: skip
    assert (video.cache_directory, video.bucket_no_upscale) == ("v", False)
    assert (image.kind, image.resolution, image.bucket_no_upscale) == ("image", (512, 512), True)
    assert (image.directory, image.jsonl, image.cache_directory) == ("i", "", "c")


def test_the_defaults(tmp_path):
    made = dataset(tmp_path)
    assert made.resolution == (960, 544) and made.target_frames == (1,) and made.frame_extraction == "head"
    assert (made.frame_stride, made.frame_sample, made.max_frames, made.source_fps) == (1, 1, 129, None)
    assert not dataset(tmp_path, bucket_no_upscale=True).bucket_no_upscale  # it counts with enable_bucket only


def test_target_frames_are_rounded_down_with_a_warning(tmp_path, caplog):
    assert dataset(tmp_path, target_frames=[33, 1, 17, 35, 18]).target_frames == (1, 17, 33)
    assert "1, 17, 33" in caplog.text
    caplog.clear()
    assert dataset(tmp_path, target_frames=[25, 1, 25]).target_frames == (1, 25)
    assert not caplog.text


def test_buckets_are_those_of_musubi_tuner():
    """Figures of musubi-tuner 0.3.4."""
    assert len(buckets_of((960, 544))) == 47
    assert all(w % 16 == h % 16 == 0 for w, h in buckets_of((960, 544)))
    assert len(buckets_of((32, 32))) == len({(16, 64), (64, 16), (32, 32)})


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1920, 1080), (960, 544)), ((320, 240), (832, 624)), ((4000, 500), (1472, 352)), ((352, 1472), (352, 1472))],
)
def test_a_picture_takes_the_bucket_of_the_nearest_proportions(size, bucket, tmp_path):
    assert bucket_chooser(dataset(tmp_path, enable_bucket=True))(size) == bucket
    # by definition, over all buckets
    errors = {each: abs(each[0] / each[1] - size[0] / size[1]) for each in buckets_of((960, 544))}
    assert errors[bucket] == min(errors.values())


def test_small_pictures_keep_their_size_without_upscaling(tmp_path):
    choose = bucket_chooser(dataset(tmp_path, enable_bucket=True, bucket_no_upscale=True))
    assert choose((333, 250)) == (320, 240)
    assert choose((960, 544)) == (960, 544)
    assert choose((1920, 1080)) == (960, 544)


def test_without_buckets_every_picture_has_the_resolution(tmp_path):
    assert bucket_chooser(dataset(tmp_path, resolution=[100, 60]))((1920, 1080)) == (100, 60)


WINDOWS = {
    "head": ({}, [(0, 5), (0, 9)]),
    "chunk": ({}, [(0, 5), (5, 5), (10, 5), (15, 5), (0, 9), (9, 9)]),
    "slide": ({"frame_stride": 6}, [(0, 5), (6, 5), (12, 5), (0, 9), (6, 9)]),
    "uniform": ({"frame_sample": 3}, [(0, 5), (7, 5), (15, 5), (0, 9), (5, 9), (11, 9)]),
    "full": ({}, [(0, 17)]),
}


@pytest.mark.parametrize("extraction", WINDOWS)
def test_windows_of_a_clip_of_20_frames(extraction, tmp_path):
    settings, expected = WINDOWS[extraction]
    made = dataset(tmp_path, frame_extraction=extraction, target_frames=[5, 9, 21], **settings)
    assert windows_of(20, made) == [Window(*each) for each in expected]
    assert windows_of(4, made) == ([Window(0, 1)] if extraction == "full" else [])


def test_equal_starts_of_uniform_windows_are_one_window(tmp_path):
    made = dataset(tmp_path, frame_extraction="uniform", target_frames=[5], frame_sample=4)
    assert windows_of(6, made) == [Window(0, 5), Window(1, 5)]


def test_full_takes_whole_latents_within_max_frames(tmp_path):
    made = dataset(tmp_path, frame_extraction="full", max_frames=31)
    assert windows_of(100, made) == [Window(0, 29)]


def test_frames_are_dropped_to_24_per_second_and_never_doubled(tmp_path):
    every = dataset(tmp_path, frame_extraction="full", source_fps=30.0)
    times = list(itertools.accumulate([24 / 30.0] * 99, initial=0.0))
    expected = [n for n in range(100) if n == 0 or int(times[n]) != int(times[n - 1])]
    assert used_frames(100, every) == expected and len(expected) == 80
    assert list(used_frames(100, replace(every, source_fps=None))) == list(range(100))
    assert used_frames(100, replace(every, source_fps=12.0)) == list(range(100))


def test_head_sees_too_few_frames_of_slow_clips(tmp_path):
    made = dataset(tmp_path, target_frames=[17], source_fps=12.0)
    assert len(used_frames(100, made)) == 9 and windows_of(9, made) == []


def test_media_are_listed_by_name_with_extensions_in_lower_or_upper_case(tmp_path):
    names = ["b.mp4", "a.MKV", "c.Mp4", ".d.mp4", "e.gif", "f.mpeg"]
    for name in names:
        captioned(tmp_path / name).touch()
    frame_folder(tmp_path / "g.mov", 1)
    captioned(tmp_path / "g.mov")
    (tmp_path / "under").mkdir()
    (tmp_path / "under" / "h.mp4").touch()
    found = find_items(dataset(tmp_path, video_directory=str(tmp_path)))
    assert [each.path.removeprefix(f"{tmp_path}/") for each in found] == ["a.MKV", "b.mp4", "f.mpeg", "g.mov"]
    assert [each.stem for each in found] == ["a", "b", "f", "g"]


def test_an_image_without_a_caption_is_left_out_and_a_video_is_refused(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png").with_suffix(".txt").unlink()
    (image,) = read_config(
        write_config(tmp_path / "i.json", {"image_directory": str(tmp_path), "caption_extension": ".txt"})
    )
    assert [each.stem for each in find_items(image)] == ["a"]
    (tmp_path / "c.mp4").touch()
    with pytest.raises(UserError, match=r"no caption \(\.txt\) for 1 of 1, first .*c\.mp4"):
        find_items(dataset(tmp_path, video_directory=str(tmp_path)))


def test_stems_are_cut_at_the_last_extension_and_a_slash_at_the_end_leaves_none(tmp_path):
    listed = ["x/a.b.mp4", "x/shots.v1", "x/shots/"]
    write_jsonl(tmp_path / "v.jsonl", "video", listed)
    made = read_config(
        write_config(tmp_path / "a.json", {"video_jsonl_file": str(tmp_path / "v.jsonl"), "cache_directory": "c"})
    )
    assert [(each.path, each.stem) for each in find_items(made[0])] == list(
        zip(listed, ["a.b", "shots", ""], strict=True)
    )
