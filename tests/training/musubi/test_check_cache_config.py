"""With a dataset config, check-cache finds what is stale, missing, or warped in time; --repair makes it anew."""

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import needs
from command import refusal
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.kvae.pixels import HUNYUAN_HALF_RANGE, to_unit
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.serving.video_writer import write_video
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.musubi.cache_files import CacheName, write_cache
from kvae_comfyui.training.vaes import HunyuanVAE, load_hunyuan_vae
from musubi_media import clip, picture, write_config
from musubi_side import run_musubi

K5 = CACHED["kandinsky5"]
HUNYUAN, KVAE = ["--hunyuan-vae", "tiny"], ["--encoder", "kvae"]


def panned(frames: int, seed: int, speed: int = 3) -> torch.Tensor:
    """A smooth picture that a camera pans over, uint8 [3, T, 48, 64]."""
    noise = torch.randn(1, 3, 6, 30, generator=torch.Generator().manual_seed(seed))
    wide = (127.5 + 60 * F.interpolate(noise, (48, 64 * 4), mode="bicubic")[0]).clamp(0, 255).byte()
    return torch.stack([wide[:, :, i * speed : i * speed + 64] for i in range(frames)], 1)


def whole(vae: HunyuanVAE, x: torch.Tensor) -> torch.Tensor:
    """Raw latents of the first 4n + 1 frames of a clip, each of its own frames: [16, F, 6, 8]."""
    return vae.encode(x[None, :, : (x.shape[1] - 1) // 4 * 4 + 1])[0]


def tiled(vae: HunyuanVAE, x: torch.Tensor) -> torch.Tensor:
    """Raw latents as musubi-tuner makes them, in tiles of 25 frames, 18 apart, whose first latents it blends away."""
    tiles = [whole(vae, x[:, i : i + 25])[:, 1 if i else 0 :] for i in range(0, x.shape[1], 18)]
    parts = [tiles[0][:, :6]]
    for before, tile in pairwise(tiles):
        parts += [before[:, -1:], tile[:, 1:5]]
    return torch.cat(parts, 1)


def name_of(stem: str, frames: int) -> str:
    return CacheName(stem, 0, frames, 64, 48, "k5").file_name


@pytest.fixture
def dataset(tmp_path):
    """Make videos, their caches of Kandinsky 5 and the config that names them; returns the arguments of check-cache."""
    vae = load_hunyuan_vae("tiny", "cpu")

    def make(encode=whole, frames: int = 33, stems: str = "ab", speed: int = 3, **settings) -> list[str]:
        (tmp_path / "videos").mkdir()
        for seed, stem in enumerate(stems):
            x = panned(frames, seed, speed)
            write_video(tmp_path / "videos" / f"{stem}.mp4", x, 24)
            (tmp_path / "videos" / f"{stem}.txt").write_text("a caption")
            write_cache(tmp_path / "caches" / name_of(stem, frames), K5, encode(vae, x), 64, 48, frames)
            save_file({"text_float16": torch.zeros(3)}, tmp_path / "caches" / f"{stem}_k5_te.safetensors")
        places = {"video_directory": str(tmp_path / "videos"), "cache_directory": str(tmp_path / "caches")}
        rest = {"caption_extension": ".txt", "resolution": [64, 48], "target_frames": [frames]}
        config = tmp_path / "data.json"
        config.write_text(json.dumps({"datasets": [places | rest | settings]}))
        return ["check-cache", str(tmp_path / "caches"), "--dataset-config", str(config), "--device", "cpu"]

    return make


def check(argv: list[str], capsys) -> tuple[int, list[str], str]:
    """Run the command; returns the exit code, the lines about files, and the rest."""
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    lines = out.strip().splitlines()
    faults = [line for line in lines if re.match(r"[^:]*\.safetensors: ", line)]
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    return code, faults, "\n".join([line for line in lines if line not in faults] + skipped)


@pytest.mark.parametrize("vae", [HUNYUAN, KVAE], ids=["hunyuan", "kvae"])
def test_latents_at_their_own_frames_are_silent(dataset, capsys, vae):
    code, faults, rest = check([*dataset(), *vae], capsys)
    assert (code, faults) == (0, [])
    assert "not checked" not in rest


@pytest.mark.parametrize("vae", [HUNYUAN, KVAE], ids=["hunyuan", "kvae"])
def test_latents_that_are_warped_in_time_are_found(dataset, capsys, vae):
    code, faults, _ = check([*dataset(tiled), *vae], capsys)
    assert code == 1
    assert [line.split(": ")[0] for line in faults] == [name_of("a", 33), name_of("b", 33)]
    assert all("warped in time: " in line for line in faults)


def test_the_middle_of_large_pictures_is_enough(dataset, capsys, monkeypatch):
    monkeypatch.setattr("kvae_comfyui.training.musubi.time_warp.SIDE", 4)
    assert check([*dataset(tiled, stems="a"), *HUNYUAN], capsys)[0] == 1


def test_a_stale_cache_or_a_lost_video_is_no_example(dataset, tmp_path, capsys):
    argv, folder = [*dataset(tiled, stems="abc"), *HUNYUAN], tmp_path / "caches"
    (tmp_path / "videos" / "a.mp4").unlink()  # a's cache is stale now
    (tmp_path / "videos" / "b.mp4").write_bytes(b"not a video")
    code, faults, rest = check(argv, capsys)
    assert code == 1
    assert sum(f"warped in time: {name_of('c', 33)} shows" in line for line in faults) == 3
    assert "skipped: " in rest
    assert len(list(folder.iterdir())) == 6


def test_tiles_do_no_harm_to_short_clips(dataset, capsys):
    assert check([*dataset(tiled, frames=25), *HUNYUAN], capsys)[:2] == (0, [])


@needs.musubi
def test_the_tiles_are_those_of_musubi(monkeypatch):
    theirs = needs.musubi_module(monkeypatch, "hunyuan_model.autoencoder_kl_causal_3d").AutoencoderKLCausal3D
    vae, x = load_hunyuan_vae("tiny", "cpu"), panned(41, 0)
    settings = {"tile_sample_min_tsize": 24, "tile_latent_min_tsize": 6, "tile_overlap_factor": 0.25}
    model = SimpleNamespace(
        encoder=vae.vae.encoder, quant_conv=vae.vae.quant_conv, use_spatial_tiling=False, **settings
    )
    model.blend_t = partial(theirs.blend_t, model)
    with torch.inference_mode():
        pixels = to_unit(x[None], HUNYUAN_HALF_RANGE)
        expected = theirs.temporal_tiled_encode(model, pixels).latent_dist.mode()[0]
    # frames after the last whole latent count in its normalisation
    torch.testing.assert_close(tiled(vae, x), expected, atol=0.02, rtol=0)


def test_what_cannot_be_told_is_said(dataset, capsys):
    argv = dataset(speed=0)
    code, faults, rest = check([*argv, *HUNYUAN], capsys)
    assert (code, faults) == (0, [])
    assert "not checked: a warp in time, as the clips that move most move too little" in rest
    assert "not checked: whether 2 caches of 29 frames or more are warped" in check(argv, capsys)[2]


def test_stale_and_missing_caches_are_found(dataset, tmp_path, capsys):
    argv = dataset(frames=5)
    (tmp_path / "caches" / name_of("a", 5)).rename(tmp_path / "caches" / name_of("c", 5))
    save_file({"text_float16": torch.zeros(3)}, tmp_path / "caches" / "c_k5_te.safetensors")
    code, faults, _ = check(argv, capsys)
    assert code == 1
    assert faults == [
        f"{name_of('a', 5)}: no such file; expected a cache of an item in the dataset config; make it anew (--repair)",
        f"{name_of('c', 5)}: the dataset config names no such item; expected a cache of one of its items; "
        "delete it, or musubi-tuner trains on it too",
    ]


def test_a_bucket_that_the_config_does_not_give_is_found(dataset, tmp_path, capsys):
    code, faults, _ = check(dataset(frames=5, stems="a", resolution=[64, 64]), capsys)
    assert code == 1
    assert "latents of 8x6, but musubi-tuner puts it into the bucket 64x64; expected 8x8" in faults[0]


def damage(folder: Path) -> dict[str, str]:
    """Damage three of the four caches a … d; returns what is found of each."""
    nan = load_file(folder / name_of("a", 5))
    nan["latents_2x6x8_float16"][0] = float("nan")
    metadata = Weights(folder / name_of("a", 5)).metadata
    (folder / name_of("a", 5)).unlink()
    save_file(nan, folder / name_of("a", 5), metadata)
    (folder / name_of("b", 5)).write_bytes((folder / name_of("b", 5)).read_bytes()[:-1])
    (folder / name_of("c", 5)).unlink()
    return {"a": "NaN", "b": "cut short", "c": "no such file"}


@pytest.mark.parametrize("vae", [HUNYUAN, KVAE], ids=["hunyuan", "kvae"])
def test_repair_makes_the_wrong_ones_anew_and_leaves_the_others(dataset, tmp_path, capsys, vae):
    argv, folder = [*dataset(frames=5, stems="abcd"), *vae], tmp_path / "caches"
    before = {path.name: (path.stat().st_mtime_ns, load_file(path)) for path in folder.iterdir()}
    found = damage(folder)
    code, faults, rest = check([*argv, "--repair"], capsys)
    assert code == 0
    assert all(found[line[0]] in line for line in faults)
    assert len(faults) == 3
    assert "0 files with faults, 3 made anew" in rest
    assert "skipped" not in rest
    assert {path.name for path in folder.iterdir()} == before.keys()
    assert (folder / name_of("d", 5)).stat().st_mtime_ns == before[name_of("d", 5)][0]
    for stem in found:
        path = folder / name_of(stem, 5)
        assert Weights(path).metadata["kvae_source"] == f"{stem}.mp4"
        made, expected = (
            tensors["latents_2x6x8_float16"].float() for tensors in (load_file(path), before[path.name][1])
        )
        assert (made - expected).square().mean() < 0.5 * expected.square().mean()
    assert check(argv, capsys)[:2] == (0, [])


def test_repair_keeps_what_it_does_not_mend(dataset, tmp_path, capsys):
    argv, folder = [*dataset(frames=5, stems="abcd"), *HUNYUAN, "--repair"], tmp_path / "caches"
    damage(folder)
    (folder / "a_k5_te.safetensors").unlink()
    save_file({}, folder / "photo_0064x0048_k5.safetensors", {"architecture": "kandinsky5"})
    before = (folder / "photo_0064x0048_k5.safetensors").read_bytes()
    code, _, rest = check(argv, capsys)
    assert code == 1
    assert "2 files with faults, 3 made anew" in rest
    assert (folder / "photo_0064x0048_k5.safetensors").read_bytes() == before


def test_a_video_that_cannot_be_read_is_said_and_its_cache_stays(dataset, tmp_path, capsys):
    argv, folder = [*dataset(frames=5, stems="abc"), *HUNYUAN, "--repair"], tmp_path / "caches"
    damage(folder)
    for stem in "ab":
        (tmp_path / "videos" / f"{stem}.mp4").write_bytes(b"not a video")
    before = (folder / name_of("a", 5)).read_bytes()
    code, _, rest = check(argv, capsys)
    assert code == 1
    assert "2 files with faults, 1 made anew" in rest
    assert rest.count("skipped: ") == 2
    assert (folder / name_of("a", 5)).read_bytes() == before


@needs.musubi
@pytest.mark.parametrize("architecture", CACHED.values(), ids=CACHED)
def test_folders_that_musubi_itself_makes_are_silent(tmp_path, monkeypatch, capsys, architecture):
    for stem, frames, height, width in (("a_1", 21, 64, 96), ("b", 10, 90, 60), ("c", 9, 64, 96)):
        clip(tmp_path / "v" / f"{stem}.mp4", frames, height, width)
    picture(tmp_path / "i" / "d.png", 80, 60)
    video = {"video_directory": str(tmp_path / "v"), "cache_directory": str(tmp_path / "cv"), "target_frames": [5, 9]}
    image = {"image_directory": str(tmp_path / "i"), "cache_directory": str(tmp_path / "ci")}
    shared = {"caption_extension": ".txt", "resolution": [96, 64], "enable_bucket": True}
    config = write_config(tmp_path / "a.json", video | {"frame_extraction": "chunk"}, image, **shared)
    space = architecture.space

    def encode(x):
        b, _, n, height, width = x.shape
        return 2.1 * torch.randn(b, *space.latent_shape(n, height, width))

    run_musubi(monkeypatch, config, architecture.model, encode)
    for folder, count in ((tmp_path / "cv", 11), (tmp_path / "ci", 1)):
        caches = list(folder.iterdir())
        assert len(caches) == count
        for path in caches:
            save_file({"text_float16": torch.zeros(3)}, folder / CacheName.parse(path.name).text_name)
        argv = ["check-cache", str(folder), "--device", "cpu"]
        assert check(argv, capsys)[:2] == (0, [])
        assert check([*argv, "--dataset-config", str(config)], capsys)[:2] == (0, [])


def test_repair_does_not_mix_two_encoders(dataset, tmp_path, capsys):
    argv, folder = [*dataset(frames=5, stems="abcd"), "--repair"], tmp_path / "caches"
    damage(folder)
    assert check([*argv, *KVAE], capsys)[0] == 0
    (folder / name_of("c", 5)).unlink()
    assert "expected the encoder of the options" in refusal([*argv, *HUNYUAN], capsys)
    assert not (folder / name_of("c", 5)).exists()


def test_bad_options_are_refused(dataset, tmp_path, capsys):
    argv = dataset(frames=5, stems="a")
    assert "--repair needs --dataset-config, and --hunyuan-vae or" in refusal([*argv, "--repair"], capsys)
    argv[1] = str(tmp_path)
    assert "no dataset has the cache_directory" in refusal(argv, capsys)
    argv[1], argv[3] = str(tmp_path / "caches"), str(tmp_path / "absent.toml")
    assert "no such file" in refusal(argv, capsys)
