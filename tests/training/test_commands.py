"""The commands end to end on small video files, with the embedded tiny VAEs; and their refusals of bad input."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from at_step import after_steps, at_step, ctrl_c
from command import refusal
from conftest import ROOT, make_videos, shared
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.kvae import KVAE, load_kvae, save_kvae
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import Pair, find_pairs, read_pair, write_pair
from kvae_comfyui.training.evaluate.report import write_report
from kvae_comfyui.training.evaluate.spectrum import BINS
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS
from small_models import SMALL

SIZE = ["--num-frames", "9", "--height", "48", "--width", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Videos, pairs and adapters, made once for all tests that look at them."""
    folder = tmp_path_factory.mktemp("job")
    make_videos(folder / "videos" / "Wave", 8)
    assert main(["extract", *roots(folder), *SIZE]) == 0
    assert main(["train", *train_options(folder), "--epochs", "3"]) == 0
    return folder


def roots(folder):
    return ["--videos-root", str(folder / "videos"), "--output-root", str(folder / "latents")]


def train_options(folder, out="adapters"):
    out = folder / out
    return [
        *("--latent-root", str(folder / "latents"), "--batch-size", "2", "--device", "cpu"),
        *("--out-h2k", str(out / "h2k.safetensors"), "--out-k2h", str(out / "k2h.safetensors")),
    ]


def evaluate_options(folder):
    return [
        *("--latent-root", str(folder / "latents"), "--videos-root", str(folder / "videos"), "--device", "cpu"),
        *("--adapter-h2k", str(folder / "adapters" / "h2k.safetensors")),
        *("--adapter-k2h", str(folder / "adapters" / "k2h.safetensors")),
        *("--output-root", str(folder / "evaluation"), "--num-pixel-samples", "2"),
    ]


def test_extract_keeps_the_folders_of_the_videos_and_resumes(job, capsys):
    paths = find_pairs(job / "latents")
    assert [p.name for p in paths] == [f"v_Wave_g{i:02d}_c01.safetensors.zst" for i in range(1, 9)]
    pair = read_pair(paths[0])
    assert pair.z_h.shape == pair.z_k.shape == (16, 3, 6, 8)
    assert pair.source.video == "Wave/v_Wave_g01_c01.mp4" and pair.source.padded == 0
    manifest = json.loads((job / "latents" / "manifest.json").read_text())
    assert manifest["counts"] == {"extracted": 8, "already_there": 0, "skipped": 0}
    assert len(manifest["kvae"]["sha256"]) == 64
    before = [p.read_bytes() for p in paths if p != paths[2]]
    pairs = [read_pair(path) for path in paths]
    paths[2].unlink()
    assert main(["extract", *roots(job), *SIZE]) == 0
    assert "1 pairs extracted, 7 already there, 0 skipped" in capsys.readouterr().out
    again = read_pair(paths[2])
    # alone in its batch, sums have another order
    torch.testing.assert_close(again.z_h, pairs[2].z_h, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(again.z_k, pairs[2].z_k, rtol=2e-3, atol=2e-3)
    assert again.source == pairs[2].source
    assert [p.read_bytes() for p in paths if p != paths[2]] == before


def test_extract_refuses_to_mix_settings(job, capsys):
    assert main(["extract", *roots(job), *SIZE, "--sampling", "uniform"]) == 2
    assert "holds pairs made with other settings" in capsys.readouterr().err


def test_trained_adapters_describe_themselves(job):
    adapter = load_adapter(job / "adapters" / "h2k.safetensors")
    assert (adapter.source.name, adapter.target.name) == ("hunyuan_video", "kvae_3d_1.0")
    assert adapter.training_info["config"]["network"] == "residual"
    rows = [json.loads(line) for line in (job / "adapters" / "train.jsonl").read_text().splitlines()]
    val = [row["val_h2k"] for row in rows if "val_h2k" in row]
    assert len(val) == 4  # before the first epoch, at the affine map, and after each
    assert adapter.metrics["val_mse"] == min(val)
    assert (job / "adapters" / "train.png").stat().st_size > 1000
    assert json.loads((job / "adapters" / "train.json").read_text())["epochs"] == 3
    assert sorted(p.name for p in (job / "adapters").iterdir()) == [
        *("h2k.safetensors", "k2h.safetensors", "model_card.md", "report.html", "report.json"),
        *("train.json", "train.jsonl", "train.png"),
    ]


def test_the_published_recipe_is_adamw_at_a_constant_rate(job, capsys):
    """AdamW alone, at one rate from the first step to the last."""
    rates, options = [], train_options(job, "published")
    with after_steps(lambda _, adamw: rates.append([group["lr"] for group in adamw.param_groups])):
        assert main(["train", *options, "--network", "published", "--epochs", "2", "--lr", "1e-4"]) == 0
    assert rates == [[1e-4]] * 8
    out = capsys.readouterr().out
    assert "Epoch 2/2 - H→K MSE: " in out and " | K→H MSE: " in out
    assert sum(p.numel() for p in load_adapter(job / "published" / "h2k.safetensors").parameters()) == 2368


@pytest.mark.parametrize("step", [3, 5])  # the last step of an epoch, and one within the next
def test_interrupted_training_ends_where_an_uninterrupted_one_does(job, step):
    options = ["--epochs", "4", "--seed", "3"]
    assert main(["train", *train_options(job, f"whole{step}"), *options]) == 0
    with at_step(step, ctrl_c):  # the training notices it in the next step
        assert main(["train", *train_options(job, f"parts{step}"), *options]) == 130
    assert not (job / f"parts{step}" / "h2k.safetensors").exists()
    assert main(["train", *train_options(job, f"parts{step}"), *options]) == 0
    for name in ("h2k.safetensors", "k2h.safetensors"):
        whole, parts = load_adapter(job / f"whole{step}" / name), load_adapter(job / f"parts{step}" / name)
        assert all(torch.equal(a, parts.state_dict()[key]) for key, a in whole.state_dict().items())
    assert not list((job / f"parts{step}").glob("*resume*"))


def test_resuming_with_other_settings_is_refused(job, capsys):
    with at_step(1, ctrl_c):
        assert main(["train", *train_options(job, "other"), "--lr", "1e-3"]) == 130
    assert main(["train", *train_options(job, "other"), "--lr", "1e-4"]) == 2
    assert "an unfinished run had lr = 0.001, now 0.0001" in capsys.readouterr().err


def test_evaluation_reports_the_errors_of_the_adapters(job, capsys):
    assert main(["evaluate", *evaluate_options(job)]) == 0
    out = capsys.readouterr().out
    result = json.loads((job / "evaluation" / "evaluation.json").read_text())
    assert (job / "evaluation" / "evaluation.txt").read_text() in out
    latent, pixel = result["latent"]["figures"], result["pixel"]["figures"]
    h2k = load_adapter(job / "adapters" / "h2k.safetensors")
    pairs = [read_pair(path) for path in find_pairs(job / "latents")]
    with torch.no_grad():
        errors = [(h2k(p.z_h[None].float())[0] - p.z_k.float()).square().mean() for p in pairs]
    assert latent["H→K"]["mse"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    targets = torch.stack([p.z_k for p in pairs]).float()
    variance = targets.movedim(1, 0).flatten(1).var(1, unbiased=False).mean().item()
    assert latent["H→K"]["share"] == pytest.approx(latent["H→K"]["mse"] / variance, rel=1e-3)
    assert pixel["KVAE"]["psnr"] > 15
    assert set(pixel) == {
        *("Hunyuan", "KVAE", "KVAE(H→K)", "Hunyuan(K→H)"),
        *("KVAE(affine H→K)", "KVAE(pixel path)", "Hunyuan(affine K→H)", "Hunyuan(pixel path)"),
    }
    assert (job / "evaluation" / "contact_sheet.png").stat().st_size > 10_000
    check_report(job / "evaluation", result)


def check_report(folder, result):
    report = json.loads((folder / "report.json").read_text())
    assert report["evaluation"] == result
    h2k = report["adapters"]["h2k"]
    assert h2k["sha256"] == hashlib.sha256((folder.parent / "adapters" / "h2k.safetensors").read_bytes()).hexdigest()
    assert len(h2k["training"]["extraction"]["kvae"]["sha256"]) == len(h2k["training"]["pairs_sha256"]) == 64
    worst = result["latent"]["worst"]["H→K"]
    assert len(worst) == 5 and worst[0]["mse"] >= worst[-1]["mse"] and worst[0]["clip"].startswith("Wave/v_Wave_g")
    shares, deviations = (result["latent"]["channels"][key] for key in ("K→H share", "z_h std"))
    share = sum(share * deviation**2 for share, deviation in zip(shares, deviations, strict=True))
    assert share / 16 == pytest.approx(result["latent"]["figures"]["K→H"]["mse"], rel=1e-3)
    spectra = result["latent"]["spectrum"] | result["pixel"]["spectrum"]
    assert set(spectra) == {"H→K", "K→H", "KVAE(H→K)", "Hunyuan(K→H)"}
    assert all(len(each) == BINS and all(share > 0 for share in each if share is not None) for each in spectra.values())
    page, card = (folder / "report.html").read_text(), (folder / "model_card.md").read_text()
    psnr = f"{result['pixel']['figures']['KVAE(H→K)']['psnr']:.2f} dB"
    for text in (page, card, report["verdict"]):
        assert psnr in text
    assert h2k["sha256"] in page and h2k["sha256"] in card
    words, pictures = re.subn(r'src="data:image/png;base64,[^"]+"', "", page)
    assert pictures == 5  # curves, two sheets, channels, frequencies
    assert "http" not in words and "<script" not in words  # the page needs no other file


def test_a_report_escapes_the_names_of_clips(job, tmp_path):
    """Pairs, and so the names of clips, may come from anyone."""
    name = "<img src=x onerror=alert(1)>"
    result = json.loads((job / "adapters" / "report.json").read_text())["evaluation"]
    result["latent"]["worst"]["H→K"][0]["clip"] = name
    files = {key: job / "adapters" / f"{key}.safetensors" for key in ("h2k", "k2h")}
    write_report(tmp_path, files, result, tmp_path / "absent", {})
    assert name not in (tmp_path / "report.html").read_text()
    assert "&lt;img src=x" in (tmp_path / "report.html").read_text()


def test_reconstruct(job, capsys, tmp_path):
    video = job / "videos" / "Wave" / "v_Wave_g01_c01.mp4"
    for vae in ("kvae", "hunyuan"):
        out = tmp_path / f"{vae}.mp4"
        assert main(["reconstruct", "--video-path", str(video), "--vae", vae, *SIZE, "--output", str(out)]) == 0
        assert "9 frames: PSNR " in capsys.readouterr().out
        assert out.stat().st_size > 1000


def test_published_adapters_are_evaluated(job, tmp_path, capsys):
    options = evaluate_options(job)
    options[options.index("--adapter-h2k") + 1] = str(shared("seed_adapters/adapter_hunyuan_to_kvae3d.safetensors"))
    options[options.index("--adapter-k2h") + 1] = str(shared("seed_adapters/adapter_kvae3d_to_hunyuan.safetensors"))
    assert main(["evaluate", *options, "--output-root", str(tmp_path), "--videos-root", ""]) == 0
    assert "H→K→H" in capsys.readouterr().out


def test_the_demo_lists_the_files_that_it_wrote(tmp_path, capsys):
    make_videos(tmp_path / "videos", 3, frames=12)
    out = tmp_path / "demo"
    argv = ["demo", "--videos", str(tmp_path / "videos"), "--output-root", str(out), "--epochs", "2", "--device", "cpu"]
    assert main(argv) == 0
    closing = capsys.readouterr().out.rpartition("Done in ")[2]
    assert "python -m training extract --videos-root VIDEOS" in closing
    for name in (
        *("demo_hunyuan_to_kvae.safetensors", "demo_kvae_to_hunyuan.safetensors", "contact_sheet.png"),
        *("evaluation.txt", "evaluation.json", "train.png", "train.jsonl", "v_Wave_g01_c01.000.mp4"),
    ):
        assert (out / name).stat().st_size > 0
        assert name in closing
    embedded = json.loads((out / "embedded" / "report.json").read_text())["adapters"]["h2k"]
    assert embedded["training"]["pairs"] > 200 and "embedded" in closing


def test_bad_folders_and_sizes_are_refused(job, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ["--output-root", str(tmp_path / "out")]
    assert "no such folder" in refusal(["extract", "--videos-root", str(tmp_path / "absent"), *out], capsys)
    assert "no videos in it" in refusal(["extract", "--videos-root", str(empty), *out], capsys)
    assert "multiple of 8" in refusal(["extract", *roots(job), "--height", "50"], capsys)
    assert "--device moon is not available on this machine" in refusal(
        ["extract", *roots(job), "--device", "moon"], capsys
    )
    for command in ("train", "evaluate"):
        assert "no such folder" in refusal([command, "--latent-root", str(tmp_path / "absent")], capsys)
        assert "no .safetensors.zst files" in refusal([command, "--latent-root", str(empty)], capsys)
    assert not (tmp_path / "out").exists()


def test_bad_pairs_are_refused(job, tmp_path, capsys):
    z = torch.randn(16, 3, 6, 8)
    write_pair(tmp_path / "a.safetensors.zst", Pair(z, z.clone(), None))
    options = ["train", "--latent-root", str(tmp_path), "--out-h2k", str(tmp_path / "o" / "h"), "--device", "cpu"]
    assert "one video only" in refusal(options, capsys)
    write_pair(tmp_path / "b.safetensors.zst", Pair(z[:8], z.clone(), None))
    write_pair(tmp_path / "c.safetensors.zst", Pair(z[:8], z.clone(), None))
    assert "channels" in refusal(options, capsys)
    data = (tmp_path / "a.safetensors.zst").read_bytes()
    for name in "abc":
        (tmp_path / f"{name}.safetensors.zst").write_bytes(data[: len(data) // 2])
    assert "cut short or not zstd" in refusal(options, capsys)
    assert not (tmp_path / "o").exists()


def test_commands_say_where_the_tiny_hunyuan_vae_is(job, tmp_path, capsys, monkeypatch):
    """The ComfyUI package does not have this VAE."""
    monkeypatch.setitem(TINY, "hunyuan", tmp_path / "tiny_hunyuan.safetensors")
    video = str(job / "videos" / "Wave" / "v_Wave_g01_c01.mp4")
    videos, out = ["--videos-root", str(job / "videos")], str(tmp_path / "out")
    for argv in (
        ["extract", *videos, "--output-root", out, *SIZE],
        ["evaluate", *evaluate_options(job), "--output-root", out],
        ["reconstruct", "--video-path", video, "--vae", "hunyuan", "--output", f"{out}.mp4", *SIZE],
        ["demo", "--videos", str(job / "videos"), "--output-root", out, "--device", "cpu"],
    ):
        line = refusal(argv, capsys)
        assert "tiny_hunyuan.safetensors is not part of the ComfyUI package" in line, argv
        assert "repository, in training/tiny/assets" in line and "--hunyuan-vae" in line
    assert not list(tmp_path.iterdir())
    assert main(["reconstruct", "--video-path", video, "--output", f"{out}.mp4", *SIZE]) == 0  # by the tiny KVAE


def test_wrong_models_are_refused(job, tmp_path, capsys):
    tiny = ROOT / "training" / "tiny" / "assets"
    extract = ["extract", "--videos-root", str(job / "videos"), "--output-root", str(tmp_path / "out"), *SIZE]
    kvae, hunyuan = str(tiny / "tiny_kvae.safetensors"), str(tiny / "tiny_hunyuan.safetensors")
    assert "this is a KVAE-3D; expected a HunyuanVideo VAE" in refusal([*extract, "--hunyuan-vae", kvae], capsys)
    assert "this is a HunyuanVideo VAE; expected a KVAE" in refusal([*extract, "--kvae", hunyuan], capsys)
    assert "no such file or folder" in refusal([*extract, "--kvae", "absent.safetensors"], capsys)
    swapped = evaluate_options(job)
    i, j = swapped.index("--adapter-h2k") + 1, swapped.index("--adapter-k2h") + 1
    swapped[i], swapped[j] = swapped[j], swapped[i]
    assert "the two files are swapped" in refusal(["evaluate", *swapped], capsys)
    other = KVAE(SMALL["1.0"])
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    options = [*evaluate_options(job), "--kvae", str(tmp_path / "other.safetensors")]
    assert "made with another kvae" in refusal(["evaluate", *options], capsys)
    assert not (tmp_path / "out").exists()


def test_adapters_name_the_weights_of_their_vaes_and_evaluation_requires_them(job, tmp_path, capsys):
    """The same weights in another file and dtype are accepted; other weights fit neither the pairs nor the adapters."""
    h2k = load_adapter(job / "adapters" / "h2k.safetensors")
    assert h2k.weights == load_adapter(TINY_ADAPTERS["h2k"]).weights  # of the tiny VAEs, by which the pairs were made
    assert "signature" not in json.dumps(h2k.training_info)
    kvae = load_kvae(TINY["kvae"])
    save_kvae(tmp_path / "bf16.safetensors", kvae, torch.bfloat16, {})
    options = [*evaluate_options(job), "--kvae", str(tmp_path / "bf16.safetensors"), "--num-pixel-samples", "1"]
    options[options.index("--output-root") + 1] = str(tmp_path / "evaluation")
    assert main(["evaluate", *options]) == 0
    capsys.readouterr()
    with torch.no_grad():
        for parameter in kvae.parameters():
            parameter.neg_()
    save_kvae(tmp_path / "other.safetensors", kvae, torch.float32, {})
    options[options.index("--kvae") + 1] = str(tmp_path / "other.safetensors")
    assert "its pairs were made with another kvae" in refusal(["evaluate", *options], capsys)
    shutil.copytree(job / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "manifest.json").unlink()  # now only the adapters name the weights
    options[options.index("--latent-root") + 1] = str(tmp_path / "latents")
    assert "made for this project's tiny KVAE (kvae_3d_1.0)" in refusal(["evaluate", *options], capsys)
