"""Frames, names and sizes are those that musubi-tuner's own datasets extract, bit for bit."""

import os

import numpy as np
import pytest

import needs
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.training.musubi.cache import _read
from kvae_comfyui.training.musubi.config import read_config
from kvae_comfyui.training.musubi.plan import Wanted, make_plan
from musubi_media import clip, frame_folder, picture, write_config, write_jsonl
from musubi_side import extracted_by_musubi

pytest.importorskip("cv2", reason="needs cv2: install requirements-training.txt")
pytestmark = needs.musubi

EXTRACTIONS = {
    "head": {"target_frames": [1, 9, 17]},
    "head, rounded": {"target_frames": [8, 18, 18]},
    "chunk": {"frame_extraction": "chunk", "target_frames": [5, 9]},
    "slide": {"frame_extraction": "slide", "target_frames": [5, 13], "frame_stride": 3},
    "uniform": {"frame_extraction": "uniform", "target_frames": [1, 5, 17], "frame_sample": 7},
    "uniform of one": {"frame_extraction": "uniform", "target_frames": [5, 9], "frame_sample": 1},
    "full": {"frame_extraction": "full"},
    "full, cut": {"frame_extraction": "full", "max_frames": 15},
}
RATES = (None, 12.0, 23.976, 30.0)
BUCKETS = {
    "exact": {},
    "buckets": {"enable_bucket": True},
    "no upscale": {"enable_bucket": True, "bucket_no_upscale": True},
    "no upscale alone": {"bucket_no_upscale": True},
}


def extracted_by_us(config, architecture="hunyuan_video"):
    """What our command gives its encoder, by the path of the cache file."""
    wanted = Wanted(CACHED[architecture], False, False, {})
    plans = [make_plan(dataset, wanted) for dataset in read_config(config)]
    found = {}
    for plan in plans:
        for target, frames in _read(plan):
            size = target.name.width, target.name.height
            found[os.path.normpath(target.path)] = np.stack(frames), size, target.name.frames
        assert not plan.failed
    return found


def assert_as_musubi(monkeypatch, config, architecture="hunyuan_video"):
    theirs = extracted_by_musubi(monkeypatch, config, architecture)
    ours = extracted_by_us(config, architecture)
    assert ours.keys() == theirs.keys()
    for path, item in theirs.items():
        frames, size, count = ours[path]
        assert (size, count) == (item.size, item.count)
        assert np.array_equal(frames, item.frames), path
    return ours


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos that grow and shrink, in their proportions and not; one is too short for most windows."""
    root = tmp_path_factory.mktemp("v")
    clip(root / "a.mp4", 41, 96, 128)
    clip(root / "b.c.mkv", 30, 200, 90)
    clip(root / "SHORT_1.MP4", 4, 40, 40)
    return root


def dataset(tmp_path, videos, **settings):
    places = {"video_directory": str(videos), "cache_directory": str(tmp_path / "c")}
    return write_config(
        tmp_path / "a.json", places | settings, caption_extension=".txt", resolution=[80, 64], batch_size=2
    )


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_windows_of_videos(extraction, videos, tmp_path, monkeypatch):
    for rate in RATES:
        fps = {} if rate is None else {"source_fps": rate}
        assert_as_musubi(monkeypatch, dataset(tmp_path, videos, enable_bucket=True, **EXTRACTIONS[extraction], **fps))


@pytest.mark.parametrize("architecture", CACHED)
@pytest.mark.parametrize("buckets", BUCKETS)
def test_buckets_of_videos(buckets, architecture, videos, tmp_path, monkeypatch):
    found = assert_as_musubi(
        monkeypatch, dataset(tmp_path, videos, **BUCKETS[buckets], target_frames=[1, 5]), architecture
    )
    assert len({frames.shape[1:] for frames, *_ in found.values()}) == (3 if "enable_bucket" in BUCKETS[buckets] else 1)


@pytest.mark.parametrize("architecture", CACHED)
@pytest.mark.parametrize("buckets", BUCKETS)
def test_images(buckets, architecture, tmp_path, monkeypatch):
    sizes = {"a.png": (48, 64), "b.jpg": (300, 200), "c.x.WEBP": (64, 80), "d.bmp": (33, 47), "e.jpeg": (70, 500)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture(tmp_path / "i" / name, *size, seed=seed)
    for seed, (name, mode, size) in enumerate(
        [("t.png", "RGBA", (48, 64)), ("u.png", "RGBA", (300, 200)), ("g.png", "L", (90, 90)), ("p.png", "P", (60, 90))]
    ):
        picture(tmp_path / "i" / name, *size, mode=mode, seed=seed)
    (picture(tmp_path / "i" / "z.png").with_suffix(".txt")).unlink()  # left out
    places = {"image_directory": str(tmp_path / "i"), "cache_directory": str(tmp_path / "c")}
    config = write_config(
        tmp_path / "a.json", places | BUCKETS[buckets], caption_extension=".txt", resolution=[80, 64], batch_size=3
    )
    assert len(assert_as_musubi(monkeypatch, config, architecture)) == 9


def test_a_jsonl_file_of_videos_and_folders_of_images(tmp_path, monkeypatch):
    media = [clip(tmp_path / "v" / "a.mp4", 18), frame_folder(tmp_path / "f" / "shots.v1"), tmp_path / "g" / "s"]
    frame_folder(media[2], 6, 90, 60)
    write_jsonl(tmp_path / "v.jsonl", "video", [*media[:2], f"{media[2]}/"])
    places = {"video_jsonl_file": str(tmp_path / "v.jsonl"), "cache_directory": str(tmp_path / "c")}
    for rate in ({}, {"source_fps": 30.0}):
        config = write_config(
            tmp_path / "a.json", places | rate | EXTRACTIONS["slide"], resolution=64, enable_bucket=True
        )
        assert len(assert_as_musubi(monkeypatch, config)) >= 5


def test_a_jsonl_file_of_images(tmp_path, monkeypatch):
    media = [picture(tmp_path / "i" / "a.png"), picture(tmp_path / "j" / "b.png", 200, 100)]
    write_jsonl(tmp_path / "i.jsonl", "image", media)
    places = {"image_jsonl_file": str(tmp_path / "i.jsonl"), "cache_directory": str(tmp_path / "c")}
    assert len(assert_as_musubi(monkeypatch, write_config(tmp_path / "a.json", places, resolution=[96, 64]))) == 2


def test_controls_change_nothing(tmp_path, monkeypatch):
    clip(tmp_path / "v" / "a.mp4"), clip(tmp_path / "v" / "b.mp4"), clip(tmp_path / "v" / "c.mp4")
    clip(tmp_path / "k" / "a.mp4", 5), clip(tmp_path / "k" / "b.MKV", 30), frame_folder(tmp_path / "k" / "c")
    for name in ("a.png", "a_1.png"):
        picture(tmp_path / "i" / name), picture(tmp_path / "l" / name)
    picture(tmp_path / "l" / "a_1_0.png"), picture(tmp_path / "l" / "a_2.png")
    video = {"video_directory": str(tmp_path / "v"), "control_directory": str(tmp_path / "k"), "target_frames": [5]}
    image = {"image_directory": str(tmp_path / "i"), "control_directory": str(tmp_path / "l")}
    places = [{"cache_directory": str(tmp_path / name)} for name in ("c", "d")]
    config = write_config(
        tmp_path / "a.json", video | places[0], image | places[1], caption_extension=".txt", resolution=[80, 64]
    )
    assert len(assert_as_musubi(monkeypatch, config)) == 5
