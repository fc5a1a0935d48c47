"""Latent files of other programs are read as raw latents; an error asks if two readings fit, and names other files."""

import re

import pytest
import torch
from safetensors.torch import save_file

from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.architectures import MODELS
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.serving.latent_writers import save_latent

SCALE, SCALE_15, SCALE_T4S16 = 0.476986, 1.03682, 0.910344004631042
VERSION = {"latent_format_version_0": torch.empty(0)}


@pytest.fixture
def save(tmp_path):
    """Write a latent file of tensors, or of random tensors of these shapes; returns its path."""

    def save(tensors, **metadata):
        path = tmp_path / "x.safetensors"
        made = {key: each if isinstance(each, torch.Tensor) else torch.randn(each) for key, each in tensors.items()}
        save_file(made, path, metadata)
        save.first = next(iter(made.values()))
        return path

    return save


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind", "shape", "factor", "space"),
    [
        # musubi-tuner's generators, with and without a batch
        ({"latent": (16, 2, 4, 6)}, {}, "musubi-tuner latent", (1, 16, 2, 4, 6), 1 / SCALE, "hunyuan_video"),
        ({"latent": (32, 2, 4, 6)}, {}, "musubi-tuner latent", (1, 32, 2, 4, 6), 1 / SCALE_15, "hunyuan_video_1.5"),
        ({"latent": (1, 32, 2, 4, 6)}, {}, "musubi-tuner latent", (1, 32, 2, 4, 6), 1 / SCALE_15, "hunyuan_video_1.5"),
        ({"latent": (16, 16, 4, 16)}, {}, "musubi-tuner latent", (1, 16, 16, 4, 16), 1 / SCALE, "hunyuan_video"),
        # musubi-tuner's caches
        ({"latents_2x4x6_bfloat16": (16, 2, 4, 6)}, "hunyuan_video", "cache of", (1, 16, 2, 4, 6), 1, "hunyuan_video"),
        (
            {"latents_2x4x16_float16": (32, 2, 4, 16), "siglip_float16": (7, 3)},
            "hunyuan_video_1_5",
            "cache of",
            (1, 32, 2, 4, 16),
            1,
            "hunyuan_video_1.5",
        ),
        (
            {"latents_2x4x6_float32": (16, 2, 4, 6), "latents_image_2x4x6_float32": (16, 2, 4, 6)},
            "kandinsky5",
            "cache of kandinsky5",
            (1, 16, 2, 4, 6),
            1 / SCALE,
            "hunyuan_video",
        ),
        ({"latents_1x4x16_float32": (16, 1, 4, 16)}, "hunyuan_video", "cache", (1, 16, 1, 4, 16), 1, "hunyuan_video"),
        # layouts that only the metadata tell
        ({"latents": (1, 16, 5, 8, 16)}, "kandinsky5", "single", (1, 16, 16, 5, 8), 1 / SCALE, "hunyuan_video"),
        ({"latents": (1, 16, 5, 8, 16)}, "hunyuan_video", "single", (1, 16, 5, 8, 16), 1 / SCALE, "hunyuan_video"),
        ({"latents": (1, 16, 5, 8, 16)}, {"kvae_space": "kvae_3d_1.0"}, "single", (1, 16, 5, 8, 16), 1, "kvae_3d_1.0"),
        # diffusers: channels first
        ({"anything": (1, 16, 2, 4, 6)}, {}, "single tensor anything", (1, 16, 2, 4, 6), 1 / SCALE, "hunyuan_video"),
        (
            {"latents": (2, 64, 2, 4, 6)},
            {},
            "single tensor latents",
            (2, 64, 2, 4, 6),
            1 / SCALE_T4S16,
            "kvae_3d_2.0_t4s16",
        ),
        # Kandinsky 5's channels last, of diffusers and of its own code
        ({"latents": (1, 31, 8, 12, 16)}, {}, "single tensor", (1, 16, 31, 8, 12), 1 / SCALE, "hunyuan_video"),
        ({"latents": (2, 5, 64, 96, 16)}, {}, "single tensor", (2, 16, 5, 64, 96), 1 / SCALE, "hunyuan_video"),
        ({"latents": (61, 64, 96, 16)}, {}, "single tensor", (1, 16, 61, 64, 96), 1 / SCALE, "hunyuan_video"),
        # image latents are not changed
        ({"latents": (1, 4, 64, 64)}, {}, "single tensor", (1, 4, 64, 64), 1, None),
        ({"latents": (1, 16, 96, 64)}, {}, "single tensor", (1, 16, 96, 64), 1, None),
    ],
)
def test_latent_files_of_other_programs_are_read_as_raw(save, tensors, metadata, kind, shape, factor, space):
    metadata = {"architecture": metadata} if isinstance(metadata, str) else metadata
    found = load_latent(save(tensors, **metadata))
    assert kind in found.kind
    assert (found.z.shape, found.space, found.z.dtype) == (shape, space, torch.float32)
    z = save.first if save.first.ndim == len(shape) else save.first[None]
    z = z.movedim(-1, 1) if z.shape != shape else z
    torch.testing.assert_close(found.z, z * factor)


@pytest.mark.parametrize(
    "shape", [(1, 4, 64, 64), (1, 16, 96, 64), (1, 4, 48, 32), (1, 4, 16, 16), (1, 64, 1024), (1, 16, 5, 8, 16)]
)
def test_the_axes_of_a_comfyui_latent_are_never_moved(save, shape):
    found = load_latent(save({"latent_tensor": shape} | VERSION))
    assert found.kind == "ComfyUI latent"
    assert torch.equal(found.z, save.first)
    torch.testing.assert_close(load_latent(save({"latent_tensor": shape})).z, save.first / 0.18215)


@pytest.mark.parametrize(
    ("shape", "readings", "model", "expected"),
    [
        ((1, 16, 31, 8, 16), "[c, t, h, w] or [t, h, w, c]", "kandinsky5", (1, 16, 16, 31, 8)),
        ((1, 16, 31, 8, 16), "[c, t, h, w] or [t, h, w, c]", "hunyuan_video", (1, 16, 31, 8, 16)),
        ((1, 32, 31, 8, 16), "[c, t, h, w] or [t, h, w, c]", "hunyuan_video_1.5", (1, 32, 31, 8, 16)),
        ((16, 31, 8, 16), "[c, t, h, w] or [t, h, w, c]", "kandinsky5", (1, 16, 16, 31, 8)),
        ((16, 4, 30, 40), "[c, t, h, w] or an image latent", "hunyuan_video", (1, 16, 4, 30, 40)),
        ((1, 4, 16, 16), "[t, h, w, c] or an image latent", "kandinsky5", (1, 16, 1, 4, 16)),
    ],
)
def test_if_two_readings_fit_the_error_asks_for_the_model(save, shape, readings, model, expected):
    path = save({"latents": shape})
    with pytest.raises(WeightsError, match=re.escape(f"can be {readings}; set model")):
        load_latent(path)
    assert load_latent(path, model=model).z.shape == expected


def test_a_cache_without_a_model_needs_its_scale(save):
    path = save({"latents_2x4x6_float32": (16, 2, 4, 6)})
    with pytest.raises(WeightsError, match="may be raw or scaled; set scaling"):
        load_latent(path)
    z = save.first[None]
    assert torch.equal(load_latent(path, scaled=False).z, z)
    torch.testing.assert_close(load_latent(path, scaled=True).z, z / SCALE)
    assert torch.equal(load_latent(path, model="hunyuan_video").z, z)
    found = load_latent(path, model="kandinsky5")
    torch.testing.assert_close(found.z, z / SCALE)
    assert found.space == "hunyuan_video"


@pytest.mark.parametrize("architecture", ["wan", "qwen_image", "flux_kontext", "x"])
@pytest.mark.parametrize("key", ["latents_2x4x6_float32", "latents_4x6_float32", "latent"])
def test_a_cache_of_another_model_is_refused_by_name(save, architecture, key):
    path = save({key: (16, 2, 4, 6)}, architecture=architecture)
    with pytest.raises(WeightsError, match=f"a musubi-tuner cache of {architecture}, whose latents are from another"):
        load_latent(path, scaled=False, model="hunyuan_video")


@pytest.mark.parametrize("scaled", [None, False, True])
def test_a_section_of_framepack_is_refused(save, scaled):
    sections = {"latents_9x4x6_float16": (16, 9, 4, 6), "latents_clean_9x4x6_float16": (16, 2, 4, 6)}
    with pytest.raises(
        WeightsError, match="framepack, which holds a section of a clip without the clip's first latent"
    ):
        load_latent(save(sections, architecture="framepack"), scaled, "hunyuan_video")


def test_an_output_that_may_be_of_wan_is_not_guessed(save):
    theirs = {"infer_steps": "20", "guidance_scale": "5.0", "video_length": "5"}
    path = save({"latent": (16, 2, 4, 6)}, **theirs)
    with pytest.raises(WeightsError, match="may be of Wan 2.1, whose VAE is another one; .* set model"):
        load_latent(path)
    assert load_latent(path, model="hunyuan_video").space == "hunyuan_video"
    assert load_latent(save({"latent": (16, 2, 4, 6)}, **theirs, embedded_cfg_scale="6.0")).space == "hunyuan_video"
    assert load_latent(save({"latent": (32, 2, 4, 6)}, **theirs)).space == "hunyuan_video_1.5"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_caches_of_every_precision_are_read_in_float32(save, dtype):
    z = torch.randn(16, 2, 4, 6).to(dtype)
    found = load_latent(save({f"latents_2x4x6_{str(dtype)[6:]}": z}, architecture="hunyuan_video"))
    assert torch.equal(found.z, z[None].float())


@pytest.mark.parametrize(
    ("tensors", "metadata", "frames"),
    [
        ({"latents_2x4x6_float16": (16, 2, 4, 6)}, {"frame_count": "5", "architecture": "kandinsky5"}, 5),
        ({"latents_1x4x6_float16": (16, 1, 4, 6)}, {"architecture": "kandinsky5"}, None),
        ({"latent": (16, 2, 4, 6)}, {"video_length": "6"}, 6),
        ({"latent": (16, 2, 4, 6)}, {"video_length": "None"}, None),
        ({"latent": (16, 2, 4, 6)}, {"video_length": "5", "kvae_frames": "3"}, 3),
    ],
)
def test_the_metadata_tell_the_number_of_frames(save, tensors, metadata, frames):
    assert load_latent(save(tensors, **metadata)).frames == frames


@pytest.mark.parametrize("name", ["hunyuan_video", "kvae_3d_1.0", "kvae_3d_2.0_t4s8"])
def test_a_file_that_names_its_space_is_unscaled_by_its_factor(save, name):
    path = save({"latent_tensor": (1, 16, 2, 4, 4)} | VERSION, kvae_space=name)
    assert torch.equal(load_latent(path).z, save.first)
    found = load_latent(path, scaled=True)
    torch.testing.assert_close(found.z, save.first / (SCALE if name == "hunyuan_video" else 1))
    assert found.space == name
    assert load_latent(path, model=name).space == name
    other = next(each for each in MODELS if each != name)
    with pytest.raises(WeightsError, match=f"the file names the space {name}, but model is {other}"):
        load_latent(path, model=other)


def test_our_latent_file_keeps_space_and_frames(tmp_path):
    z = torch.randn(1, 16, 2, 4, 4)
    save_latent(tmp_path / "x.latent", z, "kvae_3d_1.0", 6, {"prompt": "{}"})
    found = load_latent(tmp_path / "x.latent")
    assert torch.equal(found.z, z)
    assert (found.space, found.frames) == ("kvae_3d_1.0", 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_latent_file_keeps_every_part_bit_for_bit(tmp_path, dtype):
    z, audio, other = (torch.randn(shape).to(dtype) for shape in ((1, 16, 2, 4, 4), (1, 8, 26, 16), (1, 3)))
    audio[0, 0, 0, 0] = torch.nan  # the video is worth saving all the same
    save_latent(tmp_path / "x.latent", z, None, None, {"kvae_parts": "1"}, [audio, other])
    found = load_latent(tmp_path / "x.latent")
    assert len(found.others) == 2
    for part, saved in zip((found.z, *found.others), (z, audio, other), strict=True):
        assert part.dtype == dtype
        assert torch.equal(part.view(torch.uint8), saved.view(torch.uint8))
    assert load_latent(tmp_path / "x.latent", scaled=True).z.dtype == torch.float32


def test_a_file_without_parts_holds_one(save):
    assert load_latent(save({"latent_tensor": (1, 16, 2, 4, 4)} | VERSION)).others == ()
    assert load_latent(save({"latent_tensor": (1, 16, 2, 4, 4)} | VERSION, kvae_parts="")).others == ()


TWO = {"latent_tensor": (1, 16, 2, 4, 4), "latent_part_2": (1, 8, 26, 16)} | VERSION


@pytest.mark.parametrize(
    ("tensors", "parts", "words"),
    [
        (TWO, "3", "kvae_parts is 3, so after latent_tensor come latent_part_2, latent_part_3, but the file holds "
         "latent_part_2; save the latent again"),
        (TWO, "1", "come none, but the file holds latent_part_2"),
        (TWO, None, "kvae_parts is 1, so after latent_tensor come none, but the file holds latent_part_2"),
        ({"latent_tensor": (1, 16, 2, 4, 4)}, "2", "come latent_part_2, but the file holds none"),
        (TWO, "10", "kvae_parts is '10'; expected a number from 1 to 9"),
        (TWO, "9" * 5000, "kvae_parts is '999"),
        (TWO, "two", "kvae_parts is 'two'; expected a number"),
        (TWO | {"latent_part_2": (1, 0, 26)}, "2", "latent_part_2: This latent is empty, [1, 0, 26]"),
        (TWO | {"latent_part_2": torch.ones(1, 8, dtype=torch.int32)}, "2", "latent_part_2: This latent is of int32"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_hold_its_parts_is_refused_in_one_line(save, tensors, parts, words):
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_latent(save(tensors, **({"kvae_parts": parts} if parts else {})))
    assert "\n" not in str(caught.value)


def test_a_file_of_parts_that_is_cut_short_is_refused(tmp_path):
    save_latent(tmp_path / "x.latent", torch.ones(1, 16, 2, 4, 4), None, None, {}, [torch.ones(1, 8, 26, 16)])
    whole = (tmp_path / "x.latent").read_bytes()
    (tmp_path / "x.latent").write_bytes(whole[:-16])
    with pytest.raises(WeightsError, match="cut short"):
        load_latent(tmp_path / "x.latent")


def test_parts_that_no_file_can_hold_are_refused_before_anything_is_written(tmp_path):
    z = torch.ones(1, 16, 2, 4, 4)
    for others, words in (
        ([z] * 9, "This latent has 10 parts; expected at most 9"),
        ([None], "This latent is a NoneType"),
        ([z.int()], "This latent is of int32"),
    ):
        with pytest.raises(ValueError, match=words):
            save_latent(tmp_path / "y.latent", z, None, None, {}, others)
    assert list(tmp_path.iterdir()) == []


SPOILT = {
    "NaN": (torch.full((1, 16, 2, 4, 4), torch.nan), "512 of 512 values of this latent are NaN or infinite"),
    "integers": (torch.ones(1, 16, 2, 4, 4, dtype=torch.int8), "This latent is of int8; expected a tensor of float32"),
    "bool": (torch.ones(1, 16, 2, 4, 4, dtype=torch.bool), "This latent is of bool"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_latents_that_are_not_finite_floats_are_neither_read_nor_written(save, tmp_path, name):
    z, words = SPOILT[name]
    for key in ("latent_tensor", "latent", "latents_2x4x4_float32", "latents"):
        with pytest.raises(WeightsError, match=f"{key}: {words}"):
            load_latent(save({key: z}, architecture="hunyuan_video"))
    with pytest.raises(ValueError, match=words):
        save_latent(tmp_path / "y.latent", z, None, None, {})
    assert not (tmp_path / "y.latent").exists()


def test_complex_empty_and_absent_latents_are_refused(save, tmp_path):
    with pytest.raises(WeightsError, match="This latent is of complex64"):
        load_latent(save({"latent_tensor": torch.ones(1, 16, 2, 4, 4, dtype=torch.complex64)}))
    with pytest.raises(WeightsError, match="This latent is empty"):
        load_latent(save({"latent": (16, 0, 4, 4)}))
    for bad, words in (
        (None, "This latent is a NoneType"),
        ([1.0], "This latent is a list"),
        (torch.ones(1, 16, 2, 4, 4).numpy(), "This latent is a ndarray"),
        (torch.ones(1, 16, 2, 4, 4).to_sparse(), "This latent is sparse_coo"),
        (torch.ones(1, 16, 2, 4, 4, device="meta"), "on the meta device"),
        (torch.ones(1, 16, 2, 4, 4).to(torch.float8_e4m3fn), "This latent is of float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=words):
            save_latent(tmp_path / "y.latent", bad, None, None, {})
    for frames in ("six", 0, -3, 2.5, True, [6]):
        with pytest.raises(ValueError, match="kvae_frames of this latent is .*; expected a number of frames"):
            save_latent(tmp_path / "y.latent", torch.ones(1, 16, 2, 4, 4), None, frames, {})


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"a": (1,), "b": (1,)}, {}, "its tensors are a, b …; expected a latent"),
        ({"a": (1,)}, {}, "its tensors are a …; expected a latent"),
        ({"latent_tensor": (1, 16, 2, 4, 4)}, {"kvae_space": "wan"}, "names the space 'wan'; expected one of"),
        ({"latent_tensor": (1, 4, 8, 8)}, {"kvae_space": "kvae_3d_1.0"}, "a latent of kvae_3d_1.0 has 16 channels"),
        ({"latent_tensor": (1, 16, 2, 4, 4)}, {"kvae_frames": "many"}, "kvae_frames is 'many'; expected a number"),
        ({"latent_tensor": (1, 16, 2, 4, 4)}, {"kvae_frames": "-5"}, "kvae_frames is '-5'"),
        ({"latent_tensor": (1, 16, 2, 4, 4)}, {"kvae_frames": "9" * 5000}, "kvae_frames is '999"),
        ({"latents_2x4x6_float32": (8, 2, 4, 6)}, {"architecture": "kandinsky5"}, "hunyuan_video has 16 channels"),
        ({"latents_2x4x6_float32": (16, 4, 6)}, {"architecture": "kandinsky5"}, "a latent has 4 or 5 dimensions"),
        ({"latent": (16, 4, 6)}, {}, "latent is [16, 4, 6]; a latent has 4 or 5 dimensions"),
    ],
)
def test_other_files_are_refused_in_one_line(save, tensors, metadata, words):
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_latent(save(tensors, **metadata))
    assert "\n" not in str(caught.value)


def test_pickles_and_unknown_models_are_refused(save, tmp_path):
    torch.save({}, tmp_path / "latent.pt")
    with pytest.raises(WeightsError, match="a pickle can run code"):
        load_latent(tmp_path / "latent.pt")
    with pytest.raises(WeightsError, match="no model is called 'wan'"):
        load_latent(save({"latent": (16, 2, 4, 6)}), model="wan")
