"""vfl-head learns to tell characters apart; an interrupted or killed run ends as one that was not, bit for bit."""

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from at_step import at_step, ctrl_c
from command import launch, refusal, start
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.vfl import head as training
from kvae_comfyui.training.vfl.backbone import load_backbone
from kvae_comfyui.training.vfl.head_files import load_head
from kvae_comfyui.training.vfl.head_setup import VflHeadConfig, nearest, set_up
from kvae_comfyui.training.vfl.identity import Embedder
from kvae_comfyui.training.vfl.index import Index
from kvae_comfyui.training.vfl.shards import shard_path
from vfl_characters import character, make_characters, save_dinov3

needs.package("transformers", "requirements-vfl.txt")
needs.package("webdataset", "requirements-vfl.txt")
STATE = "head.resume.safetensors"
CHANGING = ["--flip", "--colour", "0.2", "--blur", "1"]  # every view, each at random


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data set and backbone."""
    root = tmp_path_factory.mktemp("made")
    group = [("fire", "water", "")[i % 3] for i in range(12)]
    make_characters(root / "set", 12, line=group)
    save_dinov3(root / "dinov3")
    return root


def options(made: Path, out: Path, *more: str, steps: int = 12) -> list[str]:
    return [
        *("vfl-head", "--data-root", str(made / "set"), "--backbone", str(made / "dinov3"), "--output-root", str(out)),
        *("--identities", "8", "--steps", str(steps), "--val-every", "5", "--dims", "32,16", "--device", "cpu", *more),
    ]  # fmt: skip


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "head.jsonl").read_text().splitlines()]


def same_run(a: Path, b: Path) -> None:
    """Equal weights, equal figures, bit for bit."""
    for name in ("head.safetensors", "head.last.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert log(a) == log(b)
    assert not (b / STATE).exists()


def test_it_tells_characters_apart(made, tmp_path, capsys):
    """By the files alone: other pictures of the characters, through DINOv3 and the head."""
    assert main(options(made, tmp_path, "--lr", "3e-3", "--val-every", "30", steps=90)) == 0
    backbone = load_backbone(str(made / "dinov3"), "cpu")
    head, about = load_head(tmp_path / "head.safetensors", backbone)
    views = training.set_up(VflHeadConfig(str(made / "set"), str(made / "dinov3"), str(tmp_path), identities=8)).views
    pictures = torch.stack([views.whole(character(i, 5000 + j)) for i in range(12) for j in range(4)])
    with torch.no_grad():
        e = Embedder(backbone, head)(pictures)
    cosines, who = e @ e.T, torch.arange(12).repeat_interleave(4)
    equal, apart = who[:, None] == who, ~torch.eye(48, dtype=torch.bool)
    same, other = cosines[equal & apart].mean(), cosines[~equal].mean()
    assert same > 0.9 and other < 0.1
    assert about.metrics["same"] == pytest.approx(same.item(), abs=0.05)
    assert about.metrics["gap"] == max(row["val_same"] - row["val_other"] for row in log(tmp_path))
    untrained = log(tmp_path)[0]
    assert untrained["val_same"] - untrained["val_other"] < 0.1
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"cosine {about.metrics['same']:.3f} on average" in report["verdict"]
    page = (tmp_path / "report.html").read_text()
    assert report["verdict"] in page and "untrained" in page and str(tmp_path) not in page
    assert "nearest right" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("head.json", "head.jsonl", "head.last.safetensors", "head.safetensors", "report.html", "report.json"),
    ]  # fmt: skip


@pytest.mark.parametrize("step", [2, 4])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(made, tmp_path, capsys, step):
    """Between two validations, and before one. The processes tell each other of Ctrl-C in the next step."""
    more = [*CHANGING, "--nearest", "--dropout", "0.3"]
    assert main(options(made, tmp_path / "whole", *more)) == 0
    with at_step(step, ctrl_c):
        assert main(options(made, tmp_path / "parts", *more)) == 130
    assert (tmp_path / "parts" / STATE).exists()
    capsys.readouterr()
    assert main(options(made, tmp_path / "parts", *more)) == 0
    assert f"Going on from step {step + 1}" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "parts")


@needs.posix
def test_a_killed_run_ends_as_an_unkilled_one(made, tmp_path, capsys):
    argv = options(made, tmp_path / "parts", steps=20)
    process = start(*argv)  # on one thread, as this process: other numbers of threads round differently
    deadline = time.time() + 120
    while not (tmp_path / "parts" / STATE).exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    psutil.Process(process.pid).kill()
    process.communicate()
    assert (tmp_path / "parts" / STATE).exists()
    assert main(argv) == 0
    assert "Going on from step" in capsys.readouterr().out
    assert main(options(made, tmp_path / "whole", steps=20)) == 0
    same_run(tmp_path / "whole", tmp_path / "parts")


@needs.posix
def test_two_processes_train_as_one_does(made, tmp_path):
    """Even though the second draws other random numbers. Each computes DINOv3's features of half of a batch."""
    more = [*CHANGING, "--nearest", "--dropout", "0.3"]
    assert main(options(made, tmp_path / "one", *more)) == 0
    process = launch(*options(made, tmp_path / "two", *more), program=(str(Path(__file__).with_name("head_ranks.py")),))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("2 processes, on cpu") == out.count("Training on 72 pictures") == 1
    first, second = (load_file(tmp_path / name / "head.last.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=1e-6)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


def test_half_of_a_batch_is_of_one_group(made, tmp_path):
    config = VflHeadConfig(str(made / "set"), str(made / "dinov3"), str(tmp_path), identities=6, groups="line")
    batches = set_up(config).train
    line = Index(made / "set", "train").columns["line"]
    for step in range(50):
        first, *others = batches.chosen(0, step)
        near = sum(line[i] == line[first] for i in others[:2])
        assert near == 2 or not line[first]


def test_the_nearest_identities_are_those_of_the_largest_cosine():
    means = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 0], [-1, 0], [0.5, 0.5]])
    assert nearest(means, 0, 2) == [1, 4]
    assert nearest(means, 0, 9) == [1, 4, 3]  # the third was never seen
    assert nearest(torch.zeros(4, 2), 1, 2) == []


def test_the_nearest_are_found_anew_at_each_validation(made, tmp_path):
    with at_step(7, ctrl_c):
        assert main(options(made, tmp_path, "--nearest")) == 130
    state = Weights(tmp_path / STATE)
    means, running = state["nearest.means"], state["nearest.running"]
    assert means.any() and not torch.equal(means, running)
    assert (running.norm(dim=1) <= 1 + 1e-6).all() and running.any(1).all()


def test_pictures_that_cannot_be_read_are_named_at_the_end(made, tmp_path, capsys):
    """They are left out of batches; an identity of val that has one is left out of that batch."""
    shutil.copytree(made / "set", tmp_path / "set")
    shutil.copytree(made / "dinov3", tmp_path / "dinov3")
    for split, name in (("train", b"003-2"), ("val", b"001-1001")):
        path = shard_path(tmp_path / "set", split, 0)
        data = bytearray(path.read_bytes())
        at = data.index(b"\x89PNG", data.index(name + b".png"))
        data[at : at + 8] = bytes(8)
        path.write_bytes(data)
    assert main(options(tmp_path, tmp_path / "out")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [each.split(":")[1].strip() for each in lines] == ["001-1001", "003-2"]
    assert all(each.startswith("skipped: ") for each in lines)


def test_a_finished_run_is_not_replaced_by_the_random_head_of_the_next(made, tmp_path):
    assert main(options(made, tmp_path)) == 0
    before = (tmp_path / "head.safetensors").read_bytes()
    with at_step(2, ctrl_c):
        assert main(options(made, tmp_path)) == 130
    assert (tmp_path / "head.safetensors").read_bytes() == before


class Flat(torch.nn.Module):
    """A stand-in for DINOv3: colours of a small picture."""

    width, side, name, digest = 48, 4, "flat", "0" * 64

    def forward(self, p):
        return torch.nn.functional.interpolate(p, (4, 4), mode="area").flatten(1)


def test_any_frozen_backbone_can_be_given(made, tmp_path):
    out = str(tmp_path)
    config = VflHeadConfig(str(made / "set"), "flat", out, identities=8, steps=40, val_every=20, lr=1e-3, device="cpu")
    assert training.run(config, Flat()) == 0
    rows = log(tmp_path)
    assert rows[-1]["val_same"] - rows[-1]["val_other"] > 0.5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data-root", "nowhere"], "no such manifest"),
        (["--backbone", "/nowhere"], "no such folder"),
        (["--identities", "13"], "12 of the 12 identities have 2 pictures or more; expected 13"),
        (["--pictures", "7"], "7 pictures or more"),
        (["--groups", "row"], "no such column in train's manifest; its further columns: line"),
        (["--groups", "line", "--nearest"], "choose one"),
        (["--dims", "512,"], "--dims is 512,"),
        (["--dims", "0"], "--dims is 0"),
        (["--background", "256,0,0"], "--background is 256,0,0"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--identity-key", "who"], "who"),
        (["--lr", "1e30"], "lower --lr"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(made, tmp_path, capsys, more, words):
    assert words in refusal(options(made, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out" / STATE).exists() and not (tmp_path / "out" / "head.safetensors").exists()


def test_a_val_split_that_shows_no_pair_is_refused(tmp_path, made, capsys):
    make_characters(tmp_path / "set", 2, pictures=1)
    shutil.rmtree(tmp_path / "set" / "data" / "train")
    shutil.copytree(made / "set" / "data" / "train", tmp_path / "set" / "data" / "train")
    shutil.copy(made / "set" / "manifest" / "train_manifest.csv", tmp_path / "set" / "manifest")
    argv = options(made, tmp_path / "out", "--data-root", str(tmp_path / "set"))
    assert "0 identities of the split val have 2 pictures or more; expected 2" in refusal(argv, capsys)


@pytest.fixture(scope="module")
def unfinished(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("unfinished")
    with at_step(7, ctrl_c):
        assert main(options(made, out)) == 130
    return out


def test_other_settings_are_refused_by_name(made, unfinished, capsys):
    assert "temperature = 0.1, now 0.2" in refusal(options(made, unfinished, "--temperature", "0.2"), capsys)
    assert "identities = 8, now 4" in refusal(options(made, unfinished, "--identities", "4"), capsys)


def test_other_pictures_and_another_backbone_are_refused(made, unfinished, tmp_path, capsys):
    """Even under the same names."""
    shutil.copytree(unfinished, tmp_path / "out")
    text = Weights(tmp_path / "out" / STATE).metadata["config"]
    for name in ("set", "dinov3"):
        shutil.copytree(made / name, tmp_path / name)
    path = tmp_path / "out" / STATE
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata["config"] = text.replace(str(unfinished), str(tmp_path / "out")).replace(str(made), str(tmp_path))
    save_file(tensors, path, metadata)
    shutil.rmtree(tmp_path / "dinov3")
    save_dinov3(tmp_path / "dinov3", seed=3)
    assert "other backbone than there are now" in refusal(options(tmp_path, tmp_path / "out"), capsys)
    shutil.rmtree(tmp_path / "dinov3")
    shutil.copytree(made / "dinov3", tmp_path / "dinov3")
    shutil.rmtree(tmp_path / "set")
    make_characters(tmp_path / "set", 11)
    assert "other pictures than there are now" in refusal(options(tmp_path, tmp_path / "out"), capsys)


PROGRESS = [{"validated": 9}, {"validated": -1}, {"step": 99}, {"step": None}, {"best": {}}, {"rows": 0}, {"last": 3}]


@pytest.mark.parametrize("change", PROGRESS, ids=str)
def test_a_damaged_state_is_an_error_of_one_line(change, made, unfinished, capsys):
    path = unfinished / STATE
    before = path.read_bytes()
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata["progress"] = json.dumps(json.loads(metadata["progress"]) | change)
    save_file(tensors, path, metadata)
    try:
        assert "not the state of a training run" in refusal(options(made, unfinished), capsys)
    finally:
        path.write_bytes(before)
