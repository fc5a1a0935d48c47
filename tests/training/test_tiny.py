"""The embedded tiny VAEs and adapters: their quality; and their training, which resumes and is reproducible."""

import json

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from at_step import at_step, ctrl_c
from conftest import ROOT, make_videos, shared
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.adapters.muon import orthogonalise
from kvae_comfyui.training.adapters.ridge import Ridge
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.videos import Clip, find_videos, read_clip
from kvae_comfyui.training.evaluate.evaluate import psnr
from kvae_comfyui.training.tiny import data
from kvae_comfyui.training.tiny import train as command
from kvae_comfyui.training.tiny import training as tiny_training
from kvae_comfyui.training.tiny.components import pca_psnr, pixel_blocks
from kvae_comfyui.training.tiny.model import MODELS, build, decode, posterior_of, skeleton
from kvae_comfyui.training.vaes import (
    TINY,
    TINY_15_ADAPTERS,
    TINY_ADAPTERS,
    load_hunyuan_vae,
    load_kvae_for_training,
)

PAIRS = {"first": ("tiny", "tiny", TINY_ADAPTERS), "second": ("tiny-1.5", "tiny-t4s16", TINY_15_ADAPTERS)}


def load_pair(which):
    hunyuan, kvae, _ = PAIRS[which]
    return load_hunyuan_vae(hunyuan, "cpu"), load_kvae_for_training(kvae, "cpu")


# PSNR in dB on every sixth validation clip; that in the file is the mean over all of them
ON_EVERY_SIXTH = {"kvae": 27.21, "hunyuan": 26.96, "kvae-t4s16": 27.47, "hunyuan-1.5": 25.75}


@pytest.mark.parametrize("name", TINY)
def test_unseen_clips_are_reconstructed_as_well_as_the_docs_say(name):
    videos = find_videos(shared("clips/ucf101"), "test")[::6]
    vae = (load_kvae_for_training if name.startswith("kvae") else load_hunyuan_vae)(str(TINY[name]), "cpu")
    clips = [read_clip(Clip(video, 17, 0), 128, 128) for video in videos]
    figures = [psnr(vae.decode(vae.encode(clip[None]))[0], clip.float()) for clip in clips]
    assert sum(figures) / len(figures) == pytest.approx(ON_EVERY_SIXTH[name], abs=0.05)
    with safe_open(TINY[name], "pt") as file:
        said = json.loads(file.metadata()["metrics"])["val_psnr"]
    assert f"{said:.2f} dB" in (ROOT / "docs" / "training.md").read_text("utf-8")
    assert TINY[name].stat().st_size <= 8e6


@pytest.mark.parametrize("which", PAIRS)
def test_no_pointwise_affine_map_joins_the_two_spaces(which):
    """No 1x1x1 affine map turns one into the other, not even a map fitted on the test clips themselves."""
    videos = find_videos(shared("clips/ucf101"), "test")[::6]
    hunyuan, kvae = load_pair(which)
    h, k = hunyuan.space.channels, kvae.space.channels
    fits = Ridge(h, k, 1), Ridge(k, h, 1)
    pairs = []
    for video in videos:
        clip = read_clip(Clip(video, 5, 0), 128, 128)[None]
        z_h, z_k = hunyuan.encode(clip), kvae.encode(clip)
        fits[0].add(z_h, z_k)
        fits[1].add(z_k, z_h)
        pairs.append((z_h, z_k))
    for fit, forth in zip(fits, (True, False), strict=True):
        affine = fit.solve().requires_grad_(False)
        errors = [(affine(a if forth else b) - (b if forth else a)).square().mean().item() for a, b in pairs]
        assert sum(errors) / len(errors) > 0.02 * fit.target_variance()


@pytest.mark.parametrize("which", ["first", "second"])
@torch.inference_mode()
def test_the_embedded_adapters_fit_the_embedded_pair(which):
    """On unseen clips the error of each direction is what its file says."""
    videos = find_videos(shared("clips/ucf101"), "test")[::6]
    hunyuan, kvae = load_pair(which)
    adapters = [load_adapter(PAIRS[which][2][way]) for way in ("h2k", "k2h")]
    errors = torch.zeros(2)
    for video in videos:
        clip = read_clip(Clip(video, 9, 0), 128, 128)[None]
        z = [vae.encode(clip) for vae in (hunyuan, kvae)]
        for i, adapter in enumerate(adapters):
            errors[i] += (adapter(z[i]) - z[1 - i]).square().mean() / len(videos)
    for adapter, error in zip(adapters, errors.tolist(), strict=True):
        assert error == pytest.approx(adapter.metrics["val_mse"], rel=0.3)
        # HunyuanVideo 1.5's 32 channels do not hold all that is in KVAE's 64
        most = 0.15 if adapter.source.channels < adapter.target.channels else 0.07
        assert adapter.metrics["val_mse_share_of_variance"] < most


@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_training_gives_the_weights_of_an_uninterrupted_one(tmp_path, model, monkeypatch, capsys):
    videos = tmp_path / "videos"
    for path in make_videos(videos, 9, frames=20, height=48, width=48):
        path.rename(path.with_name(path.name.replace("_g09", "_g10")))  # groups 1 to 7 validate, groups 8 and 10 train
    monkeypatch.setattr(data, "SIDE", 32)
    monkeypatch.setattr(data, "FRAMES", 5)
    monkeypatch.setattr(tiny_training, "PCA_SAMPLE", data.Stage(1, 32, 20))
    stages = "4x16x2:skeleton,2x32x1" if MODELS[model][0] == 8 else "2x16x2:coarse,1x16x2:level-1,3x32x1"
    options = ["--model", model, "--videos-root", str(videos), "--stages", stages, "--device", "cpu"]
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert main(["tiny", *options, "--output", str(whole)]) == 0

    monkeypatch.setattr(command, "SAVE_STEPS", 3)
    with at_step(5, ctrl_c):
        assert main(["tiny", *options, "--output", str(parts)]) == 130
    state = tmp_path / "parts.resume.safetensors"
    good = state.read_bytes()
    tensors, metadata = load_file(state), Weights(state).metadata
    for progress in ("null", '{"step": 99, "seconds": 1, "metrics": {}}', '{"step": 5}'):
        save_file(tensors, state, metadata | {"progress": progress})
        capsys.readouterr()
        assert main(["tiny", *options, "--output", str(parts)]) == 2
        assert "not the state of a training run" in capsys.readouterr().err
    state.write_bytes(good)
    assert main(["tiny", *options, "--output", str(parts)]) == 0
    log = (tmp_path / "parts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    a, b = load_file(whole), load_file(parts)
    assert all(torch.equal(a[key], b[key]) for key in a)
    again = tmp_path / "again.safetensors"
    more = ["--model", model, "--videos-root", str(videos), "--stages", "1x16x1", "--device", "cpu"]
    assert main(["tiny", *more, "--start-from", str(whole), "--output", str(again)]) == 0


def test_the_skeleton_ends_with_its_context():
    kvae = build("kvae")
    torch.nn.init.normal_(kvae.decoder.mid.block_1.conv2.conv.weight)
    z = torch.randn(1, 16, 1, 2, 2)
    before = kvae.decode(z)
    with skeleton():
        assert not torch.allclose(kvae.decode(z), before)
    assert torch.equal(kvae.decode(z), before)


def test_a_new_model_is_its_own_skeleton():
    for model in ("kvae", "hunyuan"):
        vae = build(model).eval()
        x = torch.rand(1, 3, 5, 32, 32)
        whole = posterior_of(vae, x).mean  # with gradients, as in training
        with skeleton():
            torch.testing.assert_close(posterior_of(vae, x).mean, whole)


@torch.inference_mode()
def test_batches_of_the_newer_hunyuan_are_computed_as_diffusers_computes_single_clips():
    ours = build("hunyuan-1.5")
    theirs = AutoencoderKLHunyuanVideo15.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 9, 32, 32)
    z = posterior_of(ours, x).mean
    torch.testing.assert_close(z, torch.cat([posterior_of(theirs, clip[None]).mean for clip in x]))
    torch.testing.assert_close(decode(ours, z), torch.cat([decode(theirs, each[None]) for each in z]))


def test_orthogonalised_updates_have_singular_values_near_one():
    for shape in ((8, 30), (30, 8)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular.min() > 0.5 and singular.max() < 1.3  # the coefficients trade exactness for speed


def test_principal_components_code_blocks_of_pixels():
    """More components give a higher PSNR. A block has 4 frames of 8x8 pixels; the first block repeats frame 0."""
    clips = [torch.randint(0, 256, (3, 9, 16, 16), dtype=torch.uint8) for _ in range(60)]
    assert pca_psnr(clips, clips[:3], side=8, count=700) > pca_psnr(clips, clips[:3], side=8, count=16) + 5
    x = torch.randn(1, 3, 5, 16, 24)
    y = pixel_blocks(x, 8)
    assert y.shape == (1, 2, 2, 3, 768)
    assert torch.equal(y[0, 1, 1, 2].view(3, 4, 8, 8), x[0, :, 1:5, 8:16, 16:24])
    assert (y[0, 0, 0, 0].view(3, 4, 8, 8) == x[0, :, :1, :8, :8]).all()
    assert torch.equal(pixel_blocks(x[..., :16], 16)[0, 1, 0, 0].view(3, 4, 16, 16), x[0, :, 1:5, :, :16])


def test_malformed_stages_are_refused(tmp_path, capsys):
    argv = ["tiny", "--videos-root", str(tmp_path), "--output", str(tmp_path / "x.safetensors"), "--stages"]
    for text in ("100", "10x12x4", "10x256x1", "10x32x4:"):
        assert main([*argv, text]) == 2
        assert "expected STEPSxSIDExBATCH" in capsys.readouterr().err
    assert main([*argv, "10x24x4", "--model", "kvae-t4s16"]) == 2
    assert "multiples of 16" in capsys.readouterr().err
    assert main([*argv, "10x32x4:skeleton", "--model", "hunyuan-1.5"]) == 2
    assert "a part 'skeleton'; this model has fine-encoder, coarse-encoder" in capsys.readouterr().err


def test_a_file_of_another_model_is_not_continued(tmp_path, capsys):
    options = ["--videos-root", str(tmp_path), "--output", str(tmp_path / "x.safetensors"), "--stages", "1x32x1"]
    for model, start in (("kvae-t4s16", "kvae"), ("hunyuan-1.5", "hunyuan")):
        assert main(["tiny", *options, "--model", model, "--start-from", str(TINY[start])]) == 2
        assert f"it has 16 channels for 8x8 pixels; that is not --model {model}" in capsys.readouterr().err
