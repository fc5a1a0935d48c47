"""`evaluate --latents`: what KVAE with an adapter changes in generations, told without any video."""

import json
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from command import refusal
from conftest import moving_picture
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.serving.latent_writers import save_clip, save_latent
from kvae_comfyui.serving.metrics import psnr, temporal_error
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.evaluate.generations import OUTPUTS, Judged, judge_clip
from kvae_comfyui.training.evaluate.spectrum import BINS
from kvae_comfyui.training.vaes import TINY_ADAPTERS, load_hunyuan_vae, load_kvae_for_training

H = SPACES["hunyuan_video"]
SAME = 10 * np.log10(255**2 / 1e-9)  # dB of equal videos, see serving.metrics


def picture(frames=6):
    return moving_picture(frames, 24, 32) / 255


def judged(y, x):
    found = Judged()
    judge_clip(found, "clip", x, y.unbind(1), on_sheet=True)
    return found


def figures(y, x):
    return judged(y, x).clips[0]


def test_equal_decodes_differ_in_nothing():
    found = figures(picture(), picture())
    assert found == pytest.approx(
        {"clip": "clip", "psnr_source": SAME, "ssim": 1, "flicker": 0, "sharpness": 1, "red": 0, "green": 0, "blue": 0}
        | {"frames": 6},
        abs=1e-6,
    )


def test_a_shift_of_colour_is_told_as_one():
    shift = torch.tensor([5.0, 0.0, -3.0]).view(3, 1, 1, 1) / 255
    found = figures(picture() + shift, picture())
    assert [found[each] for each in ("red", "green", "blue")] == pytest.approx([5, 0, -3], abs=1e-4)
    assert found["psnr_source"] == pytest.approx(10 * np.log10(255**2 / (34 / 3)), abs=1e-4)
    assert (found["flicker"], found["sharpness"]) == pytest.approx((0, 1), abs=1e-4)


def test_a_softer_decode_is_told_by_its_sharpness_and_a_flickering_one_by_its_flicker():
    x, mean = picture(), picture().mean((2, 3), keepdim=True)
    found = judged(mean + 0.5 * (x - mean), x)
    assert found.clips[0]["sharpness"] == pytest.approx(0.5, abs=1e-5)
    assert found.spectrum.shares() == [pytest.approx(0.25, rel=1e-3)] * BINS  # half of every wave is lost
    sign = torch.tensor([1, -1, 1, -1, 1, -1]).view(1, 6, 1, 1)
    found = figures(picture() + sign * 2 / 255, picture())
    assert (found["flicker"], found["sharpness"]) == pytest.approx((4, 1), abs=1e-4)


def test_the_frames_that_differ_most_come_first_and_frames_beyond_the_clip_do_not_count():
    x = picture(9)
    y = x.clone()
    y[:, 7] = y[:, 7] * 0.8
    y[:, 2] = y[:, 2] * 0.9
    found = judged(torch.cat([y, torch.zeros_like(y)], 1), x)
    y[:, 7] = y[:, 7] * 0.5
    judge_clip(found, "worse", x, y.unbind(1), on_sheet=False)
    y[:, 2] = 0
    judge_clip(found, "worst", x, y.unbind(1), on_sheet=False)
    assert [(name, t) for _, name, t, _ in found.worst] == [("worst", 2), ("worse", 7), ("clip", 7)]
    assert found.clips[0]["frames"] == 9
    (videos,) = found.sheet  # first, middle and last frame of both and of their difference
    assert [video.shape for video in videos] == [(3, 3, 24, 32)] * 3
    assert torch.equal(videos[0], (255 * x[:, [0, 4, 8]]).round().byte())


@pytest.fixture(scope="module")
def latents():
    """Raw latents of two clips of the tiny HunyuanVideo VAE, [2, 16, 3, 4, 6]."""
    clips = torch.stack([moving_picture(9, 32, 48, seed) for seed in (0, 1)])
    return load_hunyuan_vae("tiny", "cpu").encode(clips)


def evaluate(folder, *more):
    given = ["--adapter-h2k", str(TINY_ADAPTERS["h2k"]), "--device", "cpu"]
    return ["evaluate", "--latents", str(folder / "in"), "--output-root", str(folder / "out"), *given, *more]


def test_generations_of_every_kind_are_judged_and_bad_files_are_named(latents, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for form in ("comfyui", "musubi", "diffusers", "kandinsky"):
        ending = "latent" if form == "comfyui" else "safetensors"
        save_clip(tmp_path / "in" / f"{form}.{ending}", latents[:1], H, 9, form, {})
    save_latent(tmp_path / "in" / "two.latent", latents, None, None, {})  # two clips; names no space
    save_clip(tmp_path / "in" / "short.safetensors", latents[:1], H, 7, "musubi", {})
    save_latent(tmp_path / "in" / "kvae.latent", latents, "kvae_3d_1.0", None, {})
    save_latent(tmp_path / "in" / "newer.latent", torch.randn(1, 32, 3, 4, 6), "hunyuan_video_1.5", None, {})
    (tmp_path / "in" / "broken.safetensors").write_bytes(b"none")
    assert main(evaluate(tmp_path)) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("skipped: ")]
    said = {"broken.safetensors", "kvae.latent: this is a latent of kvae_3d_1.0; the adapter reads those of hunyuan"}
    said.add("newer.latent: this is a latent of hunyuan_video_1.5; the adapter reads those of hunyuan")
    assert len(lines) == 3 and all(any(each in line for line in lines) for each in said)

    hunyuan, kvae = load_hunyuan_vae("tiny", "cpu"), load_kvae_for_training("tiny", "cpu")
    x = hunyuan.decode(latents)
    y = kvae.decode(load_adapter(TINY_ADAPTERS["h2k"])(latents))
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    clips = {clip["clip"]: clip for clip in result["clips"]}
    expected = {name: (0, 9) for name in ("comfyui", "musubi", "diffusers", "kandinsky", "two.000")}
    for name, (i, frames) in (expected | {"two.001": (1, 9), "short": (0, 7)}).items():
        assert clips.pop(name)["psnr_source"] == pytest.approx(psnr(y[i, :, :frames], x[i, :, :frames]), abs=0.02)
    assert not clips
    shorts = next(clip for clip in result["clips"] if clip["clip"] == "short")
    assert shorts["frames"] == 7
    assert shorts["flicker"] == pytest.approx(temporal_error(y[0, :, :7], x[0, :, :7]), rel=0.01)
    mean = sum(clip["psnr_source"] for clip in result["clips"]) / 7
    assert result["figures"]["psnr_source"] == pytest.approx(mean)

    assert {path.name for path in (tmp_path / "out").iterdir()} == set(OUTPUTS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"]["generated"] == result and f"{mean:.2f} dB" in report["verdict"]
    page = unescape((tmp_path / "out" / "report.html").read_text())
    assert report["verdict"] in page and page.count("<img ") == 3 and "two.001" in page
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] == 3 * 48
    assert report["verdict"] in captured.out


def test_a_run_that_can_judge_nothing_says_so_in_one_line_and_writes_nothing(latents, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert "in: no .latent, .safetensors files in it" in refusal(evaluate(tmp_path), capsys)
    (tmp_path / "in" / "a.latent").write_bytes(b"none")
    assert main(evaluate(tmp_path)) == 2
    assert "none of the 1 files could be judged" in capsys.readouterr().err
    both = "expected --latent-root, a folder of pairs, or --latents, a folder of generated latents"
    assert both in refusal(evaluate(tmp_path, "--latent-root", "pairs"), capsys)
    assert both in refusal(["evaluate", "--device", "cpu"], capsys)
    save_latent(tmp_path / "in" / "a.latent", latents, "hunyuan_video", None, {})
    swapped = evaluate(tmp_path, "--adapter-h2k", str(TINY_ADAPTERS["k2h"]))
    assert "the two files are swapped" in refusal(swapped, capsys)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
