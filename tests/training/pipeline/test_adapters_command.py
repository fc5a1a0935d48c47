"""From a folder of videos to two adapters by one command: killed, repeated, on two processes, and its refusals."""

from __future__ import annotations

import multiprocessing
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import needs
from command import launch, refusal
from conftest import ROOT, make_videos
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import find_pairs
from kvae_comfyui.training.pipeline import plan
from kvae_comfyui.training.runtime.processes import Processes

NAMES = ("hunyuan_to_kvae.safetensors", "kvae_to_hunyuan.safetensors")
SIZE = ["--num-frames", "9", "--height", "32", "--width", "32", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Groups g01 and g02, which are held out, and g08 to g17."""
    root = tmp_path_factory.mktemp("videos")
    for video in make_videos(root / "Wave", 17, frames=9, height=32, width=32)[2:7]:
        video.unlink()
    return root


def options(videos: Path, out: Path, *more: str) -> list[str]:
    return ["adapters", "--videos-root", str(videos), "--output", str(out), *SIZE, *more]


def in_a_process(argv: list[str]) -> multiprocessing.Process:
    """Start a command in a process that has imported everything already, and prints to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvae_comfyui.training.pipeline.adapters"])
    process = context.Process(target=_command, args=(argv, f"{argv[4]}.txt"))
    process.start()
    return process


def _command(argv: list[str], log: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8")  # noqa: SIM115
    sys.exit(main(argv))


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """An uninterrupted run, and the seconds it took."""
    if sys.platform == "win32":
        pytest.skip(needs.POSIX)
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    process = in_a_process(options(videos, out))
    process.join()
    assert process.exitcode == 0, Path(f"{out}.txt").read_text(encoding="utf-8")
    return out, time.monotonic() - started


def assert_equal_adapters(one: Path, other: Path) -> None:
    for name in NAMES:
        a, b = load_adapter(one / name), load_adapter(other / name)
        assert a.metrics == b.metrics
        assert all(torch.equal(a.state_dict()[key], value) for key, value in b.state_dict().items())


def test_killed_at_five_random_moments_it_makes_the_same_adapters(whole, videos, tmp_path):
    out, seconds = whole
    seed = random.randrange(10**6)
    moments = [random.Random(seed).uniform(0, seconds) for _ in range(5)]
    for moment in moments:
        process = in_a_process(options(videos, tmp_path / "out"))
        process.join(moment)
        process.kill()  # nothing, if it is done
        process.join()
    process = in_a_process(options(videos, tmp_path / "out"))
    process.join()
    assert process.exitcode == 0, f"seed {seed}"
    assert_equal_adapters(out, tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {path.name for path in out.iterdir()}, f"seed {seed}"


def test_videos_of_the_test_groups_are_held_out(whole):
    out, _ = whole
    groups = {part: [path.name[7:10] for path in find_pairs(out / "pairs" / part)] for part in ("train", "held_out")}
    assert groups == {"train": [f"g{i:02d}" for i in range(8, 18)], "held_out": ["g01", "g02"]}


def test_a_finished_run_changes_nothing_when_repeated(whole, videos, capsys):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(options(videos, out)) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"→ {out}: ")


def test_the_card_has_the_measured_figures_and_its_example_runs(whole):
    out, _ = whole
    card = (out / "README.md").read_text(encoding="utf-8")
    for line in (out / "evaluation.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("  H→K ") or line.startswith("  KVAE(H→K)"):
            assert all(figure in card for figure in line.split())
    assert card.startswith("---\n") and "hunyuan_video of `tiny`" in card and "## Licence" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace('"training/', f'"{ROOT.as_posix()}/training/')
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; z = torch.randn(1, 16, 3, 4, 4)\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(tuple(video.shape))"], cwd=out, capture_output=True, text=True
    )
    assert done.stdout.strip() == "(1, 3, 9, 32, 32)", done.stderr


@needs.posix
def test_two_processes_make_the_adapters_of_one(whole, videos, tmp_path):
    out, _ = whole
    process = launch(*options(videos, tmp_path / "out"))
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert printed.count("[4/5] train") == 1 and (tmp_path / "out" / "README.md").exists()
    for name in NAMES:
        one, two = load_adapter(out / name), load_adapter(tmp_path / "out" / name)
        assert two.metrics["val_mse"] == pytest.approx(one.metrics["val_mse"], rel=1e-4)


def test_a_plan_writes_nothing(videos, tmp_path, capsys):
    assert main(options(videos, tmp_path / "out", "--plan")) == 0
    lines = capsys.readouterr().out
    assert "10 clips of 9x32x32 to train on, 2 held out" in lines and " in all" in lines
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "OTHER_BYTES", 1e18)
    assert "GB are free; 12 clips need 1,000,000,000.00 GB" in refusal(options(videos, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--epochs", "3"], "holds a run with epochs 2; now 3; choose another --output"),
        (["--kvae", "tiny-t4s16"], "holds a run with kvae with sha256"),
    ],
)
def test_the_folder_of_another_run_is_refused(whole, videos, capsys, more, words):
    assert words in refusal(options(videos, whole[0], *more), capsys)


def test_other_videos_in_the_folder_of_a_run_are_refused(whole, tmp_path, capsys):
    make_videos(tmp_path, 9, frames=9, height=32, width=32)
    assert "holds a run with videos 12, " in refusal(options(tmp_path, whole[0]), capsys)


def test_adapters_that_another_command_made_are_not_overwritten(videos, tmp_path, capsys):
    (tmp_path / NAMES[0]).write_text("mine")
    assert "not made by this command" in refusal(options(videos, tmp_path), capsys)


def test_processes_that_share_no_disk_are_told(videos, tmp_path, capsys, monkeypatch):
    gather = Processes.gather
    monkeypatch.setattr(
        Processes, "gather", lambda self, value: [True, False] if value is True else gather(self, value)
    )
    assert "a disk that all nodes share" in refusal(options(videos, tmp_path / "out"), capsys)
