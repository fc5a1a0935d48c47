"""A cache file has the name, the tensors and the metadata that musubi-tuner's own would have."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import needs
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.architectures import ARCHITECTURES, CACHED
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.training.musubi.cache_files import (
    CacheName,
    FirstFrame,
    read_cache_header,
    write_cache,
)

HV, HV15, K5 = (CACHED[model] for model in ("hunyuan_video", "hunyuan_video_1.5", "kandinsky5"))
NAMES = {
    "clip_1_00000-017_0960x0544_hv.safetensors": CacheName("clip_1", 0, 17, 960, 544, "hv"),
    "photo_1024x0768_k5.safetensors": CacheName("photo", 0, None, 1024, 768, "k5"),
    "a_b_c_00016-129_0064x12000_hv15.safetensors": CacheName("a_b_c", 16, 129, 64, 12000, "hv15"),
    "_00000-001_0064x0064_hv.safetensors": CacheName("", 0, 1, 64, 64, "hv"),
    "1-2-3_0064x0064_hv.safetensors": CacheName("1-2-3", 0, None, 64, 64, "hv"),
    "long_123456-1017_0064x0064_hv.safetensors": CacheName("long", 123456, 1017, 64, 64, "hv"),
}


def latent(architecture, frames=5, dtype=torch.float32):
    """A raw latent [c, F, 6, 8] that is not contiguous."""
    return torch.randn(frames, architecture.space.channels, 6, 8, dtype=dtype).transpose(0, 1)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_written_and_read(name):
    assert NAMES[name].file_name == name
    assert CacheName.parse(name) == NAMES[name]


def test_windows_of_a_video_share_a_text_cache():
    names = {each.text_name for each in (CacheName("clip_1", start, 17, 960, 544, "hv") for start in (0, 17))}
    assert names == {"clip_1_hv_te.safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        "clip_1_hv_te.safetensors",
        "clip_0960x0544_hv.pt",
        "clip_0960-0544_hv.safetensors",
        "0960x0544_hv.safetensors",
        "clip_0960x-544_hv.safetensors",
        "clip_9999999999x1_hv.safetensors",
        "clip_0000x0048_hv.safetensors",
        "clip_0960x0544_.safetensors",
        "",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected {stem}_{start}-{frames}_{width}x{height}_{model}"):
        CacheName.parse(name)


@pytest.mark.parametrize("architecture", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize(("frame_count", "frames"), [(17, 5), (None, 1)])
def test_a_cache_holds_what_the_table_says(tmp_path, architecture, frame_count, frames):
    path, z = tmp_path / "x.safetensors", latent(architecture, frames)
    write_cache(path, architecture, z, 64, 48, frame_count, metadata={"encoder": "tiny"})
    expected = {f"latents_{frames}x6x8_float16": (z * (0.476986 if architecture is K5 else 1)).half()}
    if architecture is K5:
        both = expected[f"latents_{frames}x6x8_float16"]
        expected["latents_image_2x6x8_float16"] = torch.stack([both[:, 0], both[:, frames - 1]], 1)
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == torch.float16 for key in found)
    assert metadata_of(path) == {
        "architecture": architecture.name,
        "width": "64",
        "height": "48",
        "format_version": "1.0.1",
        "encoder": "tiny",
    } | ({} if frame_count is None else {"frame_count": "17"})
    header = read_cache_header(path)
    assert header.metadata == metadata_of(path)
    assert header.shapes == {key: tuple(tensor.shape) for key, tensor in expected.items()}


@pytest.mark.parametrize("architecture", CACHED.values(), ids=CACHED)
def test_our_own_reader_gets_the_raw_latent(tmp_path, architecture):
    z = latent(architecture)
    write_cache(tmp_path / "x.safetensors", architecture, z, 64, 48, 17, dtype=torch.float32)
    found = load_latent(tmp_path / "x.safetensors")
    torch.testing.assert_close(found.z[0], z)
    assert found.space == architecture.space.name


def test_the_first_frame_of_hunyuan_video_15_is_raw_and_masked(tmp_path):
    z, first = latent(HV15), FirstFrame(latent(HV15, 1), torch.randn(729, 1152))
    write_cache(tmp_path / "x.safetensors", HV15, z, 64, 48, 17, first)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {"latents_5x6x8_float16", "latents_image_5x6x8_float32", "siglip_float16"}
    image = found["latents_image_5x6x8_float32"]
    assert image.shape == (33, 5, 6, 8)
    assert torch.equal(image[:32, 0], first.z_cthw[:, 0])
    assert image[32, 0].eq(1).all()
    assert image[:, 1:].eq(0).all()
    assert torch.equal(found["siglip_float16"], first.siglip.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_key_names_the_dtype(tmp_path, dtype):
    write_cache(tmp_path / "x.safetensors", HV, latent(HV), 64, 48, 17, dtype=dtype)
    (key,) = load_file(tmp_path / "x.safetensors")
    assert key == f"latents_5x6x8_{str(dtype)[6:]}"


def test_nan_become_0_with_a_warning(tmp_path, caplog):
    z = latent(K5)
    z[0, 0, 0, :2] = float("nan")
    write_cache(tmp_path / "x.safetensors", K5, z, 64, 48, 17)
    found = load_file(tmp_path / "x.safetensors")
    assert not any(tensor.isnan().any() for tensor in found.values())
    assert found["latents_5x6x8_float16"][0, 0, 0, :2].eq(0).all()
    assert "2 of 3840 values of latents_5x6x8_float16 are NaN; replaced by 0" in caplog.text
    assert z[0, 0, 0, :2].isnan().all()  # the caller's latent is its own


def test_a_latent_that_does_not_fit_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "x.safetensors"
    write_cache(path, HV, latent(HV), 64, 48, 17)
    before = path.read_bytes()
    for architecture, z, frame_count in [(HV, latent(HV, 6), 17), (HV, latent(HV, 2), None), (HV, latent(HV15), 17)]:
        with pytest.raises(ValueError, match=r"17 frames have|1 frames have"):
            write_cache(path, architecture, z, 64, 48, frame_count)
    with pytest.raises(ValueError, match="hold no first frame"):
        write_cache(path, HV, latent(HV), 64, 48, 17, FirstFrame(latent(HV15, 1), torch.zeros(729, 1152)))
    assert path.read_bytes() == before


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_cache(path, HV, latent(HV), 64, 48, 17)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="cut short"):
        read_cache_header(path)


def test_names_are_those_of_musubi_tuner():
    assert {each.name: (each.short, each.model) for each in ARCHITECTURES.values()} == {
        "hunyuan_video": ("hv", "hunyuan_video"),
        "hunyuan_video_1_5": ("hv15", "hunyuan_video_1.5"),
        "kandinsky5": ("k5", "kandinsky5"),
        "framepack": ("fp", ""),
    }


@needs.musubi
@pytest.mark.parametrize("architecture", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("frame_count", [17, None])
def test_musubi_itself_writes_the_same_file(tmp_path, monkeypatch, architecture, frame_count):
    theirs = needs.musubi_module(monkeypatch, "dataset.image_video_dataset")
    z = latent(architecture, 5 if frame_count else 1, torch.float16)
    stem = "clip_1_00016-017" if frame_count else "clip_1"
    item = theirs.ItemInfo(f"/v/{stem}.mp4", "", (64, 48), frame_count=frame_count)
    dataset = SimpleNamespace(cache_directory=str(tmp_path / "theirs"), architecture=architecture.short)
    item.latent_cache_path = theirs.BaseDataset.get_latent_cache_path(dataset, item)
    first = FirstFrame(latent(architecture, 1), torch.randn(729, 1152)) if architecture.first_frame else None
    if architecture is HV:
        theirs.save_latent_cache(item, z.contiguous())
    elif architecture is HV15:
        image = torch.zeros(33, z.shape[1], 6, 8)
        image[:32, :1], image[32, 0] = first.z_cthw, 1
        theirs.save_latent_cache_hunyuan_video_1_5(item, z.contiguous(), image, first.siglip.half())
    else:
        scaled = (z.float() * 0.476986).half()
        theirs.save_latent_cache_kandinsky5(item, scaled, torch.stack([scaled[:, 0], scaled[:, -1]], 1))
    name = CacheName("clip_1", 16 if frame_count else 0, frame_count, 64, 48, architecture.short)
    write_cache(tmp_path / name.file_name, architecture, z, 64, 48, frame_count, first)
    (path,) = (tmp_path / "theirs").iterdir()
    assert path.name == name.file_name
    ours, expected = load_file(tmp_path / name.file_name), load_file(path)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) and ours[key].dtype == expected[key].dtype for key in ours)
    assert metadata_of(tmp_path / name.file_name) == metadata_of(path)
    with needs.musubi_module(monkeypatch, "utils.safetensors_utils").MemoryEfficientSafeOpen(
        tmp_path / name.file_name
    ) as read:
        assert all(torch.equal(read.get_tensor(key), expected[key]) for key in read.keys())  # noqa: SIM118
