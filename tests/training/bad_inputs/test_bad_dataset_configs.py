"""Dataset configs, media and options of `cache` that cannot be right are refused in one line, before any work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import needs
from bad_rows import CPU, NESTED, NO_OBJECTS, Plant, Row, check, make_job

pytest.importorskip("cv2", reason="needs cv2: install requirements-training.txt")
pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

CACHE = "cache --dataset-config {d}/a.toml --architecture hunyuan_video" + CPU
JSON = CACHE.replace("a.toml", "a.json")
FOLDER = 'video_directory = "{d}/v"\ncache_directory = "{d}/c"\ncaption_extension = ".txt"\n'
LIST = 'video_jsonl_file = "{d}/v.jsonl"\ncache_directory = "{d}/c"\n'
IMAGES = 'image_directory = "{d}/i"\ncache_directory = "{d}/c"\ncaption_extension = ".txt"\n'


def config(text: str, *media: str, general: str = "", name: str = "a.toml") -> Plant:
    """A config of one dataset, and media with captions."""

    def plant(d: Path, job: Path) -> None:
        for each in (d / "v", d / "i"):
            each.mkdir()
        for each in media:
            if each.endswith(".png"):
                Image.new("RGB", (64, 48)).save(d / each)
            else:
                shutil.copyfile(job / "videos" / "v_Wave_g01_c01.mp4", d / each)
            (d / each).with_suffix(".txt").write_text("a caption")
        head = f"[general]\n{general}\n" if general else ""
        (d / name).write_text(head + "[[datasets]]\n" + text.replace("{d}", str(d)))

    return plant


def raw(content: bytes, name: str = "a.toml") -> Plant:
    return lambda d, job: (d / name).write_bytes(content) and None


def listed(*lines: str, text: str = LIST) -> Plant:
    """A config that names a jsonl file with these lines."""

    def plant(d: Path, job: Path) -> None:
        config(text, "v/a.mp4")(d, job)
        (d / "v.jsonl").write_text("\n".join(lines).replace("{d}", str(d)) + "\n")

    return plant


def with_control(*controls: str, text: str = FOLDER, media: str = "v/a.mp4") -> Plant:
    def plant(d: Path, job: Path) -> None:
        config(text + 'control_directory = "{d}/k"\n', media)(d, job)
        (d / "k").mkdir()
        for each in controls:
            (d / "k" / each).touch()

    return plant


def cached_by_another(d: Path, job: Path) -> None:
    config(FOLDER + "resolution = [64, 48]\n", "v/a.mp4")(d, job)
    (d / "c").mkdir()
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"latents_1x6x8_float16": zeros(16, 1, 6, 8).half()}, d / "c" / "a_00000-001_0064x0048_hv.safetensors")


def two_with_one_cache(d: Path, job: Path) -> None:
    config(FOLDER + f"[[datasets]]\n{FOLDER.replace('{d}/c', '{d}/./v/../c')}", "v/a.mp4")(d, job)


GOOD = config(FOLDER, "v/a.mp4")
KEYS = [
    (
        "resolution",
        ("16", "0", "-64", "[64]", "[64, 64, 64]", "[64, 64.0]", '"64"', "[100000, 64]", "64.0", str(2**70)),
    ),
    ("caption_extension", ("1", '""', "false")),
    ("batch_size", ("1.0", '"1"')),
    ("enable_bucket", ("1", '"true"')),
    ("target_frames", ("1", "[]", "[0]", "[-4]", "[1.0]", '["1"]')),
    ("frame_extraction", ('"tail"', '""', "1")),
    *((key, ("0", "-1", "1.0")) for key in ("frame_stride", "frame_sample", "max_frames")),
    ("source_fps", ("30", "0.0", "-24.0", "inf", "nan", '"30.0"')),
    ("cache_directory", ("1", '""')),
    ("multiple_target", ("true",)),
    ("image_directory", ('"i"',)),
    ("resolutoin", ("64",)),
]
CONFIGS = [
    *(Row(CACHE, key, config("\n".join(line for line in FOLDER.splitlines() if not line.startswith(key))
                             + f"\n{key} = {value}\n", "v/a.mp4")) for key, values in KEYS for value in values),
    *(Row(CACHE, "general", config(FOLDER, "v/a.mp4", general=f"{key} = {value}"))
      for key, value in (("video_directory", '"v"'), ("target_frames", "[1]"), ("resolution", "1.5"))),
    Row(CACHE, "names no media", config('cache_directory = "{d}/c"\n')),
    Row(CACHE, "another for images", config('video_directory = "{d}/v"\nimage_directory = "{d}/v"\n')),
    Row(CACHE, "caption_extension is missing", config('video_directory = "{d}/v"\n', "v/a.mp4")),
    Row(CACHE, "cache_directory is missing", config('video_jsonl_file = "{d}/v.jsonl"\n')),
    Row(CACHE, "expected a folder for each dataset", two_with_one_cache),
    Row(CACHE, "no videos in", config(FOLDER)),
    Row(CACHE, "no images in", config(IMAGES)),
    Row(CACHE, "no such folder", raw(b'[[datasets]]\nvideo_directory = "absent"\ncaption_extension = ".txt"\n')),
    Row(CACHE, "no such file"),
    Row(CACHE.replace("a.toml", "a.yaml"), "expected a .toml or a .json", raw(b"", "a.yaml")),
    Row(CACHE, "no [[datasets]]", raw(b"[general]\nresolution = 64\n")),
    Row(CACHE, "no [[datasets]]", raw(b"datasets = []\n")),
    Row(CACHE, "'more'", raw(b"[more]\n[[datasets]]\n")),
    Row(CACHE, "not TOML", raw(b"[[datasets]\n")),
    Row(CACHE, "not UTF-8", raw(b"\xff\xfe")),
    Row(CACHE, "not TOML", raw(b"a = " + b"[" * 100_000)),
    *(Row(JSON, "not JSON", raw(text.encode(), "a.json")) for text in (*NO_OBJECTS, NESTED)),
    *(Row(JSON, "expected", raw(json.dumps(value).encode(), "a.json"))
      for value in ({"datasets": 1}, {"datasets": [1]}, {"datasets": [None]}, {"general": 1, "datasets": [{}]})),
    *(Row(JSON, "expected", raw(json.dumps({"datasets": [{key: None}]}).encode(), "a.json"))
      for key in ("video_directory", "image_directory", "resolution")),
    Row(CACHE, "a name that a file", config('video_directory = "a\\u0000b"\ncaption_extension = ".txt"\n')),
]  # fmt: skip
MEDIA = [
    *(Row(CACHE, "line 1", listed(line)) for line in ("", "{", "[]", "null", "{}", '{"video_path": 1, "caption": ""}',
      '{"video_path": "", "caption": ""}', '{"video_path": "a"}', '{"video_path": "a\\u0000", "caption": ""}', NESTED)),
    Row(CACHE, "line 2", listed('{"video_path": "a", "caption": ""}', "", '{"video_path": "a", "caption": ""}')),
    Row(CACHE, "nothing to cache in 1 media: 1 cannot be read", listed('{"video_path": "absent.mp4", "caption": ""}')),
    Row(CACHE, "no control_path", listed('{"video_path": "a", "caption": "", "control_path": "absent"}')),
    Row(CACHE, "the others are too short", config(FOLDER + "target_frames = [99]\n", "v/a.mp4")),
    Row(CACHE, "no control in", with_control()),
    Row(CACHE, "no control in", with_control("b.mp4", "a.png")),
    Row(CACHE, "no control in", with_control("b.png", "ab.png", text=IMAGES, media="i/a.png")),
    Row(CACHE, "expected a or a_NUMBER", with_control("a_x.png", text=IMAGES, media="i/a.png")),
    Row(CACHE, "made it; 1 such caches are there", cached_by_another),
]  # fmt: skip
OPTIONS = [
    Row(CACHE + " --architecture wan", "invalid choice", GOOD),
    Row(CACHE + " --i2v --image-encoder {d}", "--i2v is for", GOOD),
    Row(CACHE + " --memory-gb 2", "which needs whole clips at once", GOOD),
    Row(CACHE + " --nabla-resize", "--nabla-resize is for", GOOD),
    Row(CACHE + " --architecture hunyuan_video_1.5", "makes latents of hunyuan_video;", GOOD),
    Row(CACHE + " --architecture hunyuan_video_1.5 --encoder kvae", "kvae", GOOD),
    Row(CACHE + " --architecture hunyuan_video_1.5 --i2v", "--image-encoder", GOOD),
    Row(CACHE + " --architecture hunyuan_video_1.5 --image-encoder {d}", "--i2v", GOOD),
    Row(CACHE + " --architecture hunyuan_video_1.5 --i2v --image-encoder {d}", "of images", config(IMAGES, "i/a.png")),
    Row(CACHE + " --hunyuan-vae {d}/absent", "absent", GOOD),
    Row(CACHE + " --encoder kvae --kvae {h2k}", "this is", GOOD),
    Row(CACHE + " --encoder kvae --adapter-k2h {h2k}", "kvae", GOOD),
    Row(CACHE + " --memory-gb -1", "--memory-gb is", GOOD),
]


def _pipe(name: str) -> Plant:
    def plant(d: Path, job: Path) -> None:
        config(FOLDER if name.startswith("v") else IMAGES, name.replace("pipe", "a"))(d, job)
        os.mkfifo(d / name)
        (d / name).with_suffix(".txt").write_text("a caption")

    return plant


SKIPPED = [
    Row(CACHE, "", _pipe("v/pipe.mp4"), code=1),
    Row(CACHE, "", _pipe("i/pipe.png"), code=1),
    Row(CACHE, "", config(FOLDER + "resolution = [64, 48]\n", "v/caf\udce9\n.mp4"), code=0),
]


@pytest.mark.parametrize("row", [*CONFIGS, *MEDIA, *OPTIONS, *SKIPPED], ids=Row.name)
def test_they_are_refused(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
