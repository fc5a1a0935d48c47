"""musubi-tuner's own caching and training take the caches for their own."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import needs
from encoder_files import hunyuan_options, kvae_options
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.musubi.cache import CacheConfig
from kvae_comfyui.training.musubi.encoders import load_encoder
from musubi_media import clip, picture, write_config
from musubi_side import run_musubi

pytest.importorskip("cv2", reason="needs cv2: install requirements-training.txt")
pytestmark = needs.musubi


def dataset(folder, cache, images=True, **settings):
    """A config of videos, in several windows and buckets, and of images."""
    if not (folder / "v").exists():
        clip(folder / "v" / "a_1.mp4", 21, 64, 96)
        clip(folder / "v" / "b.mp4", 10, 90, 60)
        picture(folder / "i" / "c.png", 80, 60)
    video = {"video_directory": str(folder / "v"), "cache_directory": str(folder / cache), "target_frames": [5, 9]}
    video |= {"frame_extraction": "chunk", "source_fps": 25.0} | settings
    image = {"image_directory": str(folder / "i"), "cache_directory": str(folder / f"{cache}i")}
    return write_config(
        folder / f"{cache}.json", video, *[image] * images,
        caption_extension=".txt", resolution=[96, 64], enable_bucket=True, batch_size=2,
    )  # fmt: skip


def cache(config, architecture, *options):
    argv = ["cache", "--dataset-config", str(config), "--architecture", architecture, "--device", "cpu"]
    return main([*argv, *map(str, options)])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("c*/*.safetensors")}


def refuse(x):
    raise AssertionError(f"encodes {list(x.shape)}")


@pytest.mark.parametrize("encoder", [kvae_options, hunyuan_options])
@pytest.mark.parametrize("architecture", CACHED)
def test_its_caching_finds_nothing_to_encode_and_nothing_to_delete(architecture, encoder, tmp_path, monkeypatch):
    config = dataset(tmp_path, "c")
    assert cache(config, architecture, *encoder(tmp_path, architecture)) == 0
    before = files(tmp_path)
    assert len(before) == 9
    run_musubi(monkeypatch, config, architecture, refuse, "--skip_existing")
    assert files(tmp_path) == before


def header(path):
    with safe_open(path, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if not key.startswith("kvae_")}
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return metadata, {key: (each.get_shape(), each.get_dtype()) for key, each in slices.items()}


@pytest.mark.parametrize(("architecture", "nabla"), [*((each, False) for each in CACHED), ("kandinsky5", True)])
def test_caches_equal_those_of_its_own_caching(architecture, nabla, tmp_path, monkeypatch):
    """The same encoder in the place of its VAE gives the same files, up to the rounding of its pixels to float16."""
    options = kvae_options(tmp_path, architecture)
    ours, theirs = dataset(tmp_path, "ours"), dataset(tmp_path, "theirs")
    assert cache(ours, architecture, *options, *["--nabla-resize"] * nabla) == 0
    values = dict(zip((o.removeprefix("--").replace("-", "_") for o in options[::2]), options[1::2], strict=True))
    config = CacheConfig(dataset_config="", architecture=architecture, device="cpu", **values)
    host = load_encoder(config, CACHED[architecture].space).host

    def encode(x):
        return torch.cat([host.encode(each) for each in x.split(1)])

    run_musubi(monkeypatch, theirs, architecture, encode, *["--nabla_resize"] * nabla)
    for suffix in ("", "i"):
        made, expected = ({p.name: p for p in (tmp_path / f"{n}{suffix}").iterdir()} for n in ("ours", "theirs"))
        assert made.keys() == expected.keys()
        for name, path in expected.items():
            assert header(made[name]) == header(path)
            ours_, theirs_ = load_file(made[name]), load_file(path)
            for key, z in theirs_.items():
                assert ((ours_[key] - z).float().norm() / z.float().norm()).item() < 5e-3
