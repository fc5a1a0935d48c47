"""The bench for GPUs: all its tables appear, what runs out of memory is reported, and goals are judged by the worst."""

import logging
import sys

import pytest
import torch

from kvae_comfyui.benchmarks.gpu import __main__ as bench
from kvae_comfyui.benchmarks.gpu.comfyui import seconds_of
from kvae_comfyui.benchmarks.gpu.convolutions import by_frames, operations_of
from kvae_comfyui.benchmarks.gpu.goals import GOALS, Goal
from kvae_comfyui.benchmarks.gpu.ladder import note
from kvae_comfyui.benchmarks.gpu.limited import TILES, TRIED, Decode, decode
from kvae_comfyui.benchmarks.gpu.measure import attempt, cost_of, interleaved
from kvae_comfyui.benchmarks.gpu.models import diffusers_twin, random_kvae, run_of, source_of
from kvae_comfyui.benchmarks.gpu.setup import TINY_FAMILY, tiny_setup
from small_models import assert_same

CPU = torch.device("cpu")
HEADINGS = (
    "# Speed and memory on a GPU",
    "## One 3x3x3 convolution, TFLOP/s",
    "## KVAE-3D-1.0, seconds / GB",
    "## KVAE-3D-2.0, seconds / GB",
    "## Predicted and measured peak, GB",
    "## Little memory: decoding 9x64x64 with KVAE-3D-1.0",
    "## Training the default adapters, both directions at once",
    "## Extraction, 2 clips of 9x32x48, seconds / GB",
    "## Goals",
)


def test_every_table_of_the_report_appears(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--tiny"])
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    before = bench.PAGE.read_bytes() if bench.PAGE.exists() else None
    bench.main()
    report = capsys.readouterr().out
    assert tuple(line for line in report.splitlines() if line.startswith("#")) == HEADINGS
    for text in ("| no time", "| out of memory", "nan", "not measured"):
        assert text not in report.split("## Goals")[0]
    for model in ("1.0", "2.0-t4s8", "2.0-t4s16"):
        for direction in ("decode", "encode"):
            assert report.count(f"| {model} {direction}, 21x32x48 |") >= 2  # timed, and at least one plan
    judged = [goal for goal in GOALS if f"| {goal.text} |" in report]
    assert len(judged) == len(GOALS) and report.count("| not measured | |") == 8  # those that need a limit
    assert max(map(len, report.splitlines())) <= 400
    assert before == (bench.PAGE.read_bytes() if bench.PAGE.exists() else None)


def test_without_a_card_one_line_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no GPU here"):
        bench.main()


def test_a_section_that_fails_says_why_and_the_next_one_is_measured(monkeypatch):
    sections = {"absent": ("nowhere", "section"), "broken": ("goals", "nothing"), "goals": ("goals", "section")}
    monkeypatch.setattr(bench, "SECTIONS", sections)
    lines = list(bench.report(tiny_setup(), list(sections)))
    assert any(line.startswith("absent: not measured, since it needs ") for line in lines)
    assert any(line.startswith("broken: not measured, AttributeError: ") for line in lines)
    assert "## Goals" in lines


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("name", ["1.0", "2.0-t4s16"])
def test_the_modules_of_diffusers_compute_the_same(name, direction):
    kvae = random_kvae(TINY_FAMILY[name], CPU, torch.float32)
    source = source_of(kvae.config, direction, (29, 32, 48), CPU, torch.float32)
    with torch.no_grad():
        assert_same(run_of(kvae, direction, source)(), run_of(diffusers_twin(kvae), direction, source)())


def test_convolutions_of_frames_are_a_convolution():
    x, weight = torch.randn(1, 3, 6, 7, 9), torch.randn(4, 3, 3, 3, 3)
    torch.testing.assert_close(by_frames(x, weight), torch.nn.functional.conv3d(x, weight))


def test_operations_grow_with_the_picture():
    """By the number of positions; the 1x1x1 convolutions of the latent, and past frames, are the same in both."""
    config = TINY_FAMILY["2.0-t4s8"]
    small, large = (operations_of(config, "decode", (17, 64, width)) for width in (64, 128))
    assert large == pytest.approx(2 * small, rel=0.01)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_of_memory_is_a_result_and_other_errors_are_not():
    assert attempt(out_of_memory, CPU) is None
    assert cost_of(out_of_memory, CPU) is None
    with pytest.raises(RuntimeError, match="another"):
        cost_of(lambda: (_ for _ in ()).throw(RuntimeError("another")), CPU)
    assert cost_of(lambda: torch.zeros(1000), CPU).peak == 4000


def test_the_first_turn_counts_only_if_there_is_no_time_for_more():
    turns = []

    def side(name):
        turns.append(name)
        return torch.zeros(1000 if len(turns) <= 2 else 10)

    runs = {"a": lambda: side("a"), "b": lambda: side("b"), "c": out_of_memory}
    costs = interleaved(runs, CPU, seconds=0)
    assert turns == ["a", "b"] and costs["a"].peak == costs["b"].peak == 4000 and costs["c"] is None
    turns.clear()
    costs = interleaved(runs, CPU, seconds=60)
    assert turns == ["a", "b"] * 4 and costs["a"].peak == costs["b"].peak == 40 and costs["c"] is None


def test_a_decode_under_a_limit_tells_what_was_tried():
    def by_a_smaller_plan():
        logging.getLogger("kvae_comfyui.serving").warning("%s4-frame segments", TRIED)
        return 1

    first = decode("told", 12, {"": by_a_smaller_plan, TILES: out_of_memory}, CPU)
    assert first.tried == ["4-frame segments"] and first.seconds is not None and first.is_exact
    tiled = decode("told", 8, {"": out_of_memory, TILES: lambda: 1}, CPU)
    assert tiled.tried == [TILES] and tiled.seconds is not None and not tiled.is_exact
    failed = decode("told", 4, {"": out_of_memory, TILES: out_of_memory}, CPU)
    assert failed.seconds is None and not failed.is_exact


def test_goals_of_little_memory_are_about_the_right_decodes():
    decodes = [
        Decode("told", None, 1.0),
        Decode("told", 24, 1.1),
        Decode("told", 8, 4.0, [TILES]),
        Decode("HunyuanVideo", 24, 2.2),
        Decode("HunyuanVideo", 8, 2.0),
    ]
    setup = tiny_setup()
    note(setup, {(each.free, each.way): each for each in decodes})
    assert setup.figures["ladder fails"] == [False, True]
    assert setup.figures["ladder exact"] == [True]  # of 24 GB; 8 GB need not be
    assert setup.figures["ladder, of HunyuanVideo"] == [0.5, 2.0]
    assert setup.figures["ladder, of the whole card"] == [1.1]


def test_a_goal_is_judged_by_its_worst_figure():
    setup = tiny_setup()
    setup.figures["x"] = [3.5, 2.9]
    assert Goal("x", "x", least=3).row(setup) == "| x | ≥ 3 | 2.90 | no |"
    assert Goal("x", "x", most=4).row(setup) == "| x | ≤ 4 | 3.50 | yes |"
    assert Goal("x", "x", least=2.9, most=3.4).row(setup) == "| x | ≥ 2.9 ≤ 3.4 | 2.90 to 3.50 | no |"
    assert Goal("y", "y", most=4).row(setup) == "| y | ≤ 4 | not measured | |"


def test_seconds_of_a_prompt():
    start, end = (["execution_start", {"timestamp": 1000}], ["execution_success", {"timestamp": 3500}])
    assert seconds_of({"status": {"messages": [start, end]}}) == 2.5
    error = {"exception_type": "torch.OutOfMemoryError", "exception_message": "CUDA out of memory."}
    assert seconds_of({"status": {"messages": [start, ["execution_error", error]]}}) is None
    error = {"exception_type": "ValueError", "exception_message": "no such file"}
    with pytest.raises(RuntimeError, match="no such file"):
        seconds_of({"status": {"messages": [start, ["execution_error", error]]}})
