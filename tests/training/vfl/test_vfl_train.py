"""vfl-train: any number of processes, and any interruption, give the same LoRA, bit for bit."""

import json
import shutil
import time
from html import escape
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from vfl_jobs import make_job, train_options

import needs
from at_step import at_step, ctrl_c
from command import launch, refusal, start
from kvae_comfyui.adapters import LatentAdapter, latent_space, save_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.kvae.load import save_kvae
from kvae_comfyui.training.adapters.muon import Muon
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.vfl.lora_files import FORMATS, lora_path
from kvae_comfyui.training.vfl.lora_reading import read_lora
from small_models import small
from vfl_characters import make_characters

needs.package("peft", "requirements-vfl.txt")
needs.package("transformers", "requirements-vfl.txt")
needs.package("webdataset", "requirements-vfl.txt")
STATE = "vfl.resume.safetensors"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """An uninterrupted run of four steps of two samples."""
    out = tmp_path_factory.mktemp("whole") / "ash"
    assert main(train_options(job, out, "--batch=2")) == 0
    return out


@pytest.fixture(scope="module")
def unfinished(job, tmp_path_factory):
    """A run of four steps that was interrupted after three: processes tell each other of Ctrl-C in the next step."""
    out = tmp_path_factory.mktemp("unfinished") / "ash"
    with at_step(2, ctrl_c, Muon):
        assert main(train_options(job, out, "--batch=2")) == 130
    assert Weights(out / STATE).metadata["progress"].startswith('{"step": 3')
    return out


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "vfl.jsonl").read_text().splitlines()]


def lora(out: Path, step: int, format: str = "peft"):
    return read_lora(lora_path(out / f"step-{step}", f"{out.name}-{step}", format)).layers


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].a, b[k].a) and torch.equal(a[k].b, b[k].b) and a[k].alpha == b[k].alpha for k in a
    )


def same_run(a: Path, b: Path, step: int = 4) -> None:
    assert equal(lora(a, step), lora(b, step))
    assert log(a) == log(b)
    assert not (b / STATE).exists()


def test_it_trains_and_writes_what_four_programs_read(whole):
    first, last = lora(whole, 2), lora(whole, 4)
    assert sum(bool(pair.b.any()) for pair in last.values()) > 0.8 * len(last)  # the last text block is not used
    assert not equal(first, last)
    for format in FORMATS:
        other = lora(whole, 4, format)
        assert other.keys() == last.keys()
        for name, pair in last.items():
            change = pair.scale * pair.b @ pair.a
            torch.testing.assert_close(other[name].scale * other[name].b @ other[name].a, change)
    rows = log(whole)
    assert [row["step"] for row in rows] == [0, 2, 4, 4]
    assert rows[0]["val_distill"] == 0 and rows[0]["val_identity"] == rows[0]["val_base_identity"]
    assert rows[-1]["val_distill"] > 0 and rows[-1]["val_base_identity"] == rows[0]["val_base_identity"]
    report = json.loads((whole / "report.json").read_text())
    page = (whole / "report.html").read_text()
    assert escape(report["verdict"]) in page and str(whole.parent) not in page + json.dumps(report)
    settings = Weights(lora_path(whole / "step-4", "ash-4", "comfyui")).metadata["vfl-train"]
    assert json.loads(settings)["settings"]["rank"] == 4 and str(whole.parent) not in settings


def test_an_interrupted_run_ends_as_an_uninterrupted_one(job, whole, unfinished, tmp_path, capsys):
    out = tmp_path / "ash"
    shutil.copytree(unfinished, out)
    moved(out, unfinished)
    assert main(train_options(job, out, "--batch=2")) == 0
    assert "Going on from step 3" in capsys.readouterr().out
    same_run(whole, out)


def moved(out: Path, before: Path) -> None:
    """Let the state in a copied folder name its new place."""
    path = out / STATE
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata["config"] = metadata["config"].replace(str(before), str(out))
    save_file(tensors, path, metadata)


@needs.posix
def test_a_killed_run_ends_as_an_unkilled_one(job, whole, tmp_path, capsys):
    """By SIGKILL, from outside, once the first validation was saved."""
    out = tmp_path / "ash"
    argv = train_options(job, out, "--batch=2")
    process = start(*argv)
    deadline = time.time() + 300
    while not (out / STATE).exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    psutil.Process(process.pid).kill()
    process.communicate()
    assert (out / STATE).exists()
    assert main(argv) == 0
    assert "Going on from step" in capsys.readouterr().out
    same_run(whole, out)


@needs.posix
def test_two_processes_train_as_one_does_also_if_each_holds_a_part_of_the_base(job, whole, tmp_path):
    outs = [tmp_path / "whole" / "ash", tmp_path / "parts" / "ash"]
    commands = [train_options(job, out, "--batch=2", *more) for out, more in zip(outs, ([], ["--shard"]), strict=True)]
    program = str(Path(__file__).with_name("train_ranks.py"))
    process = launch(*commands[0], "--", *commands[1], program=(program,))
    said, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert said.count("2 processes, on cpu") == said.count("on 6 pictures of 2 identities") == 2
    for out in outs:
        assert equal(lora(out, 4), lora(whole, 4))
        for one, two in zip(log(whole), log(out), strict=True):
            assert two == pytest.approx(one, rel=1e-6)


def test_blocks_in_host_memory_give_the_same_lora_and_a_resumed_run_may_move_them(job, whole, unfinished, tmp_path):
    out = tmp_path / "ash"
    shutil.copytree(unfinished, out)
    moved(out, unfinished)
    assert main(train_options(job, out, "--batch=2", "--offload")) == 0
    same_run(whole, out)


@pytest.mark.parametrize("format", ["peft", "comfyui"])
def test_a_lora_of_any_format_can_be_started_from(job, whole, tmp_path, format, capsys):
    """Its first validation finds what the last one of the run before found; rank and alpha are the file's."""
    start_from = lora_path(whole / "step-4", "ash-4", format)
    out = tmp_path / "ash"
    with at_step(1, ctrl_c, Muon):
        assert main(train_options(job, out, f"--start-from={start_from}", "--rank=1")) == 130
    expected = {key: value for key, value in log(whole)[-1].items() if key != "step"}
    assert {key: value for key, value in log(out)[0].items() if key != "step"} == pytest.approx(expected, rel=1e-3)
    state = Weights(out / STATE)
    assert all(min(shape) >= 4 for name, shape in state.shapes.items() if name.startswith("live."))


@pytest.mark.parametrize(
    "more",
    [
        ["--rollout-guidance=3", "--identity-every=2", "--optimiser=adamw", "--targets=attention"],
        ["--base-dtype=fp8", "--offload", "--identity-sigma=0.5-0.75", "--harvest-scheme=random", "--tail=0"],
        ["--base-dtype=bf16", "--identity-weight=0", "--decode-latents=1", "--decode-scale=1"],
    ],
    ids=["guidance", "low precision", "distillation alone"],
)
def test_it_trains_under_other_settings(job, tmp_path, more):
    assert main(train_options(job, tmp_path / "ash", "--val-every=9", *more, steps=2)) == 0
    row = log(tmp_path / "ash")[-2]
    assert "appearance" not in row and (row["norm"] > 0 or "--identity-weight=0" in more)
    if "--identity-weight=0" in more:
        assert row["distill"] == 0 and "identity" not in row  # a LoRA without identity never leaves zero


def test_by_appearance_alone_an_interrupted_run_ends_as_an_uninterrupted_one(job, tmp_path):
    def run(name: str) -> int:
        more = "--appearance-weight=5", "--identity-weight=0", "--val-every=9"
        return main(train_options(job, tmp_path / name / "ash", *more, steps=3))

    assert run("whole") == 0
    with at_step(1, ctrl_c, Muon):
        assert run("stopped") == 130
    assert run("stopped") == 0
    same_run(tmp_path / "whole" / "ash", tmp_path / "stopped" / "ash", 3)
    row = log(tmp_path / "whole" / "ash")[1]
    assert row["norm"] > 0 and row["appearance"] > 0 and "identity" not in row


def test_a_kvae_can_decode_for_the_identity_loss(job, tmp_path):
    save_kvae(tmp_path / "kvae.safetensors", small("2.0-t4s16"), torch.float32, {})
    spaces = latent_space("hunyuan_video_1.5"), latent_space("kvae_3d_2.0_t4s16")
    save_adapter(tmp_path / "h2k.safetensors", LatentAdapter(Affine(32, 64), *spaces))
    places = [f"--kvae={tmp_path / 'kvae.safetensors'}", f"--adapter-h2k={tmp_path / 'h2k.safetensors'}"]
    assert main(train_options(job, tmp_path / "ash", "--val-every=9", *places, steps=1)) == 0
    assert log(tmp_path / "ash")[-2]["norm"] > 0


def test_the_plan_alone_loads_and_writes_nothing(job, tmp_path, capsys):
    assert main([*train_options(job, tmp_path / "ash"), "--plan"]) == 0
    assert "GiB" in capsys.readouterr().out
    assert not (tmp_path / "ash").exists()


def test_pictures_that_cannot_be_read_are_named_at_the_end(job, tmp_path, capsys):
    for name in ("base", "dinov3", "cache", "bank.json", "head.safetensors"):
        (tmp_path / name).symlink_to(job / name)
    shutil.copytree(job / "set", tmp_path / "set")
    path = next((tmp_path / "set" / "data" / "train").glob("*.tar"))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x89PNG", data.index(b"000-0.png"))
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    quick = "--batch=8", "--val-every=9", "--identity-weight=0"
    assert main(train_options(tmp_path, tmp_path / "out", *quick, steps=1)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("skipped: 000-0: ")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--frames=8"], "--frames is 8; expected a multiple of 4 and one more, such as 9"),
        (["--frames=4"], "--frames is 4"),
        (["--identity-band=0.9-0.1"], "--identity-band is 0.9-0.1; expected two numbers from 0 to 1"),
        (["--identity-sigma=0.01-0.02"], "no step has a noise level from 0.01 to 0.02; the nearest is"),
        (["--shard"], "--shard divides the base among processes, and there is one"),
        (["--offload", "--shard"], "--shard goes with"),
        (["--adapter-h2k=x"], "--adapter-h2k is given without --kvae"),
        (["--kvae=tiny"], "--adapter-h2k is missing"),
        (["--decode-latents=3"], "--decode-latents is 3; a clip of 5 frames has 2"),
        (["--data-root=/nowhere"], "no such manifest"),
        (["--cache-root=/nowhere"], "cache.json: no such file"),
        (["--base=/nowhere"], "no pipeline of HunyuanVideo 1.5 can be read there (no such folder)"),
        (["--backbone=/nowhere"], "no such folder"),
        (["--head=/nowhere"], "/nowhere"),
        (["--start-from=/nowhere"], "/nowhere"),
        (["--prompts=/nowhere"], "/nowhere"),
        (["--lr=1e38", "--batch=1"], "lower --lr"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(job, tmp_path, capsys, more, words):
    assert words in refusal(train_options(job, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out" / STATE).exists()


def test_a_prompt_that_is_not_in_the_cache_is_named(job, tmp_path, capsys):
    bank = json.loads((job / "bank.json").read_text()) | {"word": ["new"]}
    (tmp_path / "bank.json").write_text(json.dumps(bank))
    said = refusal(train_options(job, tmp_path / "out", f"--prompts={tmp_path / 'bank.json'}"), capsys)
    assert "new" in said and "is not in the cache" in said and "run vfl-cache again" in said


def test_other_settings_and_data_are_refused_by_name(job, unfinished, tmp_path, capsys):
    def refused(*more: str) -> str:
        return refusal(train_options(job, unfinished, "--batch=2", *more), capsys)

    assert "tail = 1, now 2" in refused("--tail=2")
    assert "batch = 2, now 4" in refused("--batch=4")
    assert "appearance_weight = 0.0, now 3.0" in refused("--appearance-weight=3")
    out = tmp_path / "ash"
    shutil.copytree(unfinished, out)
    for place in ("base", "dinov3", "cache", "bank.json", "head.safetensors"):
        (tmp_path / place).symlink_to(job / place)
    make_characters(tmp_path / "set", 2, 4)
    path = out / STATE
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata["config"] = metadata["config"].replace(str(unfinished), str(out)).replace(str(job), str(tmp_path))
    save_file(tensors, path, metadata)
    assert "other pictures than there are now" in refusal(train_options(tmp_path, out, "--batch=2"), capsys)


@pytest.mark.parametrize("change", [{"validated": 9}, {"step": 99}, {"sums": [1]}, {"rows": 0}, {"last": {}}], ids=str)
def test_a_damaged_state_is_an_error_of_one_line(change, job, unfinished, capsys):
    path = unfinished / STATE
    before = path.read_bytes()
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata["progress"] = json.dumps(json.loads(metadata["progress"]) | change)
    save_file(tensors, path, metadata)
    try:
        said = refusal(train_options(job, unfinished, "--batch=2"), capsys)
        assert "not the state of a training run" in said
    finally:
        path.write_bytes(before)
