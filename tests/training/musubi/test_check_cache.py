"""check-cache finds each kind of fault in a folder of caches, and is silent about folders in order."""

import re
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from command import refusal
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.musubi.cache_files import CacheName, FirstFrame, write_cache
from kvae_comfyui.training.musubi.folder_faults import read_folder

HV, HV15, K5 = (CACHED[model] for model in ("hunyuan_video", "hunyuan_video_1.5", "kandinsky5"))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def latent(architecture, frames, rows, columns):
    """Raw latents [c, F, H, W] with the deviation that those of HunyuanVideo have."""
    return 2.1 * torch.randn(architecture.space.channels, frames, rows, columns)


def write(folder: Path, architecture, stem: str, start=0, frames: int | None = 17, width=64, height=48, **changes):
    """Write a cache and its text cache; returns the path."""
    name = CacheName(stem, start, frames, width, height, architecture.short)
    side = architecture.space.spatial_factor
    z = latent(architecture, ((frames or 1) - 1) // 4 + 1, height // side, width // side)
    folder.mkdir(exist_ok=True)
    write_cache(folder / name.file_name, architecture, z, width, height, frames, **changes)
    save_file({"text_float16": torch.zeros(3)}, folder / name.text_name, {"architecture": architecture.name})
    return folder / name.file_name


def make_videos(folder: Path, architecture) -> Path:
    """A folder of five caches of videos, in two sizes and lengths; returns the first one's path."""
    first = write(folder, architecture, "clip_1")
    write(folder, architecture, "clip_1", 17)
    write(folder, architecture, "clip_2")
    write(folder, architecture, "clip_2", frames=5)
    write(folder, architecture, "tall", width=48, height=64)
    return first


def change(path: Path, tensors=None, **metadata):
    """Write a cache again, with these tensors and metadata in place of its own; None removes a text."""
    texts = {**metadata_of(path), **metadata}
    tensors = load_file(path) if tensors is None else tensors
    path.unlink()
    save_file(tensors, path, {key: text for key, text in texts.items() if text is not None})


def check(folder: Path, capsys, *options: str) -> tuple[int, list[str]]:
    """Run the command; returns the exit code, and the lines about files."""
    capsys.readouterr()
    code = main(["check-cache", str(folder), *options])
    lines = capsys.readouterr().out.strip().splitlines()
    return code, [line for line in lines if re.match(r"[^:]*\.safetensors: ", line)]


@pytest.mark.parametrize("architecture", CACHED.values(), ids=CACHED)
def test_folders_in_order_are_silent(tmp_path, capsys, architecture):
    make_videos(tmp_path / "videos", architecture)
    for size in ((64, 48), (500, 300)):
        name = CacheName("photo", 0, None, *size, architecture.short)
        (tmp_path / "images").mkdir(exist_ok=True)
        write_cache(tmp_path / "images" / name.file_name, architecture, latent(architecture, 1, 6, 8), *size)
        save_file({"text_float16": torch.zeros(3)}, tmp_path / "images" / name.text_name)
    assert check(tmp_path / "videos", capsys) == (0, [])
    assert check(tmp_path / "images", capsys) == (0, [])


def test_hunyuan_video_15_for_image_to_video_is_silent(tmp_path, capsys):
    for stem in ("a", "b"):
        write(tmp_path, HV15, stem, first_frame=FirstFrame(latent(HV15, 1, 3, 4), torch.randn(729, 1152)))
    assert check(tmp_path, capsys) == (0, [])


def test_stretched_latents_of_kandinsky_are_silent(tmp_path, capsys):
    for stem in ("a", "b"):
        path = write(tmp_path, K5, stem)
        write_cache(path, K5, latent(K5, 5, 16, 16), 64, 48, 17)
    assert check(tmp_path, capsys) == (0, [])


def test_files_of_other_models_are_left_aside(tmp_path, capsys):
    make_videos(tmp_path, HV)
    tensors = {"latents_5x6x8_float16": torch.zeros(16, 5, 6, 8)}
    save_file(tensors, tmp_path / "clip_00000-017_0064x0048_wan.safetensors", {"architecture": "wan"})
    save_file({"weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    (tmp_path / "clip_1.txt").write_text("a caption")
    assert check(tmp_path, capsys) == (0, [])


def meta(**texts):
    return lambda path: change(path, **texts)


def only(key, *shape, scale=2.1, dtype=torch.float16):
    """Plant a file with one tensor of normal values times `scale`."""
    return lambda path: change(path, {key: (scale * torch.randn(shape)).to(dtype)})


def plus(key, *shape, dtype=torch.float16):
    """Plant one more tensor, or another in its place."""
    return lambda path: change(path, {**load_file(path), key: torch.randn(shape).to(dtype)})


def less(key):
    return lambda path: change(path, {each: tensor for each, tensor in load_file(path).items() if each != key})


def nan(key):
    def plant(path):
        tensors = load_file(path)
        tensors[key].view(-1)[:3] = float("nan")
        change(path, tensors)

    return plant


def named(name):
    return lambda path: path.rename(path.with_name(name))


LATENTS, ENDS, WIDE = "latents_5x6x8_float16", "latents_image_2x6x8_float16", "latents_5x6x8_float32"
FIRST = "latents_image_5x3x4_float32"
SHORT_NAME, NO_SIZE = "clip_1_00000-017_64x48_hv.safetensors", "clip_1_hv.safetensors"
FAULTS = [
    ("too many latents", HV, only("latents_6x6x8_float16", 16, 6, 6, 8), "6 latents for 17 frames; expected 5"),
    ("frame_count", HV, meta(frame_count="21"), "frame_count in its metadata is '21'; expected '17'"),
    ("frame_count of text", HV, meta(frame_count="x\n"), r"frame_count in its metadata is 'x\\n'"),
    ("size", HV, only("latents_5x8x8_float16", 16, 5, 8, 8), "latents of 8x8 for 64x48 pixels; expected 8x6"),
    ("width", HV, meta(width="72"), "width in its metadata is '72'; expected '64'"),
    ("no height", HV, meta(height=None), "height in its metadata is ''; expected '48'"),
    ("short name", HV, named(SHORT_NAME), "expected clip_1_00000-017_0064x0048_hv.safetensors; rename it"),
    ("no size in the name", HV, named(NO_SIZE), "not the name of a cache; expected {stem}_{start}-{frames}"),
    ("no latents", HV, only("x", 3), "its tensors are x; expected one latents_{F}x{H}x{W}_{dtype}"),
    ("batch axis", HV, only(LATENTS, 1, 16, 5, 6, 8), f"its tensors are {LATENTS}; expected one"),
    ("channels", HV, only(LATENTS, 32, 5, 6, 8), r"is \[32, 5, 6, 8\]; expected \[16, 5, 6, 8\]"),
    ("key", HV, only("latents_5x8x6_float16", 16, 5, 6, 8), "expected a key with its shape"),
    ("one more", HV, plus("extra_float16", 3), "holds extra_float16, and musubi-tuner puts every tensor"),
    ("two", HV, plus(WIDE, 16, 5, 6, 8), f"its tensors are {LATENTS}, {WIDE}; expected one"),
    ("dtype", HV, only(LATENTS, 16, 5, 6, 8, dtype=torch.float32), "is of float32; expected one of float16"),
    ("no ends", K5, less(ENDS), "latents_image is missing; expected latents, latents_image"),
    ("one end", K5, plus(ENDS, 16, 1, 6, 8), r"is \[16, 1, 6, 8\]; expected \[16, 2, 6, 8\]"),
    ("other ends", K5, plus(ENDS, 16, 2, 6, 8), "latents_image differs from the first and the last"),
    ("no siglip", HV15, plus(FIRST, 33, 5, 3, 4, dtype=torch.float32), "siglip is missing"),
    ("nan", HV, nan(LATENTS), "3 of 3840 values of latents are NaN or infinite; expected numbers"),
    ("nan in the ends", K5, nan(ENDS), "3 of 1536 values of latents_image are NaN or infinite"),
    ("zeros", HV, only(LATENTS, 16, 5, 6, 8, scale=0), "all its latents are equal"),
    ("scaled", HV, only(LATENTS, 16, 5, 6, 8, scale=1), "scaled ones; expected raw latents, of about 2.10"),
    ("unscaled twice", HV, only(LATENTS, 16, 5, 6, 8, scale=4.4), "unscaled once more; expected raw latents"),
    ("cut short", HV, lambda path: path.write_bytes(path.read_bytes()[:-9]), "cut short or not a safetensors"),
    ("empty", HV, lambda path: path.write_bytes(b""), "cut short or not a safetensors file"),
    ("folder", HV, lambda path: (path.unlink(), path.mkdir()), "this is a folder; expected a whole safetensors"),
    ("other model", HV, meta(architecture="wan"), "its metadata is 'wan'; expected 'hunyuan_video', .* delete it"),
    ("other of ours", HV, meta(architecture="kandinsky5"), "rename it to end in _k5.safetensors"),
    ("no model", HV, meta(architecture=None), "the architecture in its metadata is ''"),
    ("no text", HV, lambda path: path.with_name("clip_1_hv_te.safetensors").unlink(), "it has no text cache"),
    ("image", HV, lambda path: write(path.parent, HV, "photo", frames=None), "a cache of an image among those"),
]


@pytest.mark.parametrize(("_", "architecture", "plant", "expected"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_fault_is_found(tmp_path, capsys, _, architecture, plant, expected):
    plant(make_videos(tmp_path, architecture))
    code, lines = check(tmp_path, capsys)
    assert code == 1
    (line,) = lines  # and nothing but it
    assert re.search(expected, line), line
    assert re.fullmatch(r"[^:]+\.safetensors: [^;]+; expected [^;]+; [^;]+", line)


def test_too_many_latents_of_kandinsky_are_those_of_musubis_tiles(tmp_path, capsys):
    path = write(tmp_path, K5, "long", frames=41)
    change(path, {"latents_12x6x8_float16": torch.randn(16, 12, 6, 8).half(), ENDS: torch.zeros(16, 2, 6, 8).half()})
    code, (line,) = check(tmp_path, capsys)
    assert code == 1
    assert "12 latents for 41 frames, which musubi-tuner's own tiles in time give: they are warped in time" in line


def test_a_damaged_text_cache_is_found(tmp_path, capsys):
    cut_text = make_videos(tmp_path, HV).with_name("clip_2_hv_te.safetensors")
    cut_text.write_bytes(cut_text.read_bytes()[:-1])
    code, (line,) = check(tmp_path, capsys)
    assert code == 1
    assert line.startswith("clip_2_hv_te.safetensors: cut short")


def test_caches_that_do_not_stack_are_found(tmp_path, capsys):
    make_videos(tmp_path / "k5", K5)
    write_cache(tmp_path / "k5" / "clip_1_00017-017_0064x0048_k5.safetensors", K5, latent(K5, 5, 16, 16), 64, 48, 17)
    code, (line,) = check(tmp_path / "k5", capsys)
    assert code == 1
    assert (
        "latents, latents_image of 16x16, which does not stack; expected latents, latents_image of 8x6, as in 2" in line
    )
    first = FirstFrame(latent(HV15, 1, 3, 4), torch.randn(729, 1152))
    for stem in "abc":
        write(tmp_path / "i2v", HV15, stem, first_frame=first if stem != "b" else None)
    code, (line,) = check(tmp_path / "i2v", capsys)
    assert code == 1
    assert line.startswith("b_00000-017_0064x0048_hv15.safetensors: latents of 4x3, which does not stack")


@pytest.mark.parametrize(
    ("architecture", "factor", "expected"),
    [(HV, 0.476986, "scaled latents: the caches here have a standard deviation of"),
     (K5, 1 / 0.476986, "raw latents: the caches here have a standard deviation of")],
)  # fmt: skip
def test_a_wrong_scale_shows_in_many_clips_though_each_may_be_right(tmp_path, capsys, architecture, factor, expected):
    contrast = torch.linspace(0.3, 1.7, 16).view(16, 1, 1, 1)  # channels differ too much for a certain fault
    for i in range(8):
        path = write(tmp_path, architecture, f"clip_{i}")
        write_cache(path, architecture, latent(architecture, 5, 6, 8) * contrast * factor * 0.8, 64, 48, 17)
    code, lines = check(tmp_path, capsys)
    assert code == 1
    assert len(lines) == 8
    assert all(expected in line for line in lines)


def test_ten_thousand_files_take_seconds(tmp_path, capsys):
    path = write(tmp_path, HV, "clip_0")
    text = tmp_path / "clip_0_hv_te.safetensors"
    for i in range(1, 500):
        (tmp_path / f"clip_{i}_00000-017_0064x0048_hv.safetensors").hardlink_to(path)
        (tmp_path / f"clip_{i}_hv_te.safetensors").hardlink_to(text)
    begun = time.perf_counter()
    assert not read_folder(tmp_path, None).faults
    assert (time.perf_counter() - begun) / 1000 < 1e-3  # 20,000 files in 20 s, on a slow machine


def test_a_folder_without_caches_is_refused(tmp_path, capsys):
    assert "no latent caches; expected files such as" in refusal(["check-cache", str(tmp_path)], capsys)
    assert "no such" in refusal(["check-cache", str(tmp_path / "absent")], capsys).lower()
    assert "--repair needs --dataset-config" in refusal(["check-cache", str(tmp_path), "--repair"], capsys)
