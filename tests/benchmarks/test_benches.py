"""Benches start, time what they say, and write what they print. They last hours, so no test runs one to its end."""

import sys
from importlib import import_module

import pytest
import torch

from conftest import ROOT
from kvae_comfyui.adapters.networks import build_network
from kvae_comfyui.benchmarks import adapters, convolutions, judge
from kvae_comfyui.benchmarks.entries import BenchEntry
from kvae_comfyui.benchmarks.ingredients import PLAIN
from kvae_comfyui.benchmarks.tables import head, publish
from kvae_comfyui.training.data.pairs import SUFFIX, Pair, Source, write_pair
from kvae_comfyui.training.directions import DIRECTIONS
from small_models import SMALL

FOLDER = ROOT / "benchmarks"
BENCHES = [
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if "ArgumentParser" in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_starts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "-h"])
    with pytest.raises(SystemExit) as end:
        import_module(f"kvae_comfyui.benchmarks.{name}").main()
    assert end.value.code == 0
    assert "python -m benchmarks." in capsys.readouterr().out


def test_steps_of_loaded_adapters_are_timed(tmp_path, monkeypatch):
    """Loaded adapters are frozen; a step needs gradients, and leaves the adapters as they were."""
    monkeypatch.setattr(judge, "ROUNDS", 1)
    monkeypatch.setattr(adapters, "ingredients", lambda: {"plain": ({}, PLAIN)})
    for i in range(8):
        z = torch.randn(2, 16, 3, 8, 8)
        write_pair(tmp_path / "train" / f"{i}{SUFFIX}", Pair(z[0], z[1], Source(f"{i}.mp4", 0, 9, 0, 64, 64)))
    networks = {d: [build_network("affine", in_channels=16, out_channels=16).requires_grad_(False)] for d in DIRECTIONS}
    entries = {name: BenchEntry(networks) for name in ("plain", "default")}
    adapters.time_steps(tmp_path, entries)
    assert all(entry.step_seconds > 0 for entry in entries.values())
    assert all(p.grad is None and not p.requires_grad for d in DIRECTIONS for p in networks[d][0].parameters())


def test_a_results_file_is_what_was_printed(tmp_path, capsys):
    publish(head("Title", "word " * 40), tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert text.startswith("# Title\n\n    python -m ") and f"PyTorch {torch.__version__}." in text
    assert max(map(len, text.splitlines()[4:])) <= 120


def test_every_convolution_of_a_model_is_timed_both_ways():
    config = SMALL["2.0-t4s8"]
    lines = list(convolutions.rows(config, (5, 32, 32), torch.device("cpu"), torch.float32, rounds=1))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    kernels = {cell[2].split("x", 2)[2] for cell in cells if cell[2]}
    assert kernels == {"3x3x3", "1x1x1", "1x3x3", "3x1x1", "1x2x2", "2x1x1"}
    for direction in ("decode", "encode"):
        each = [float(cell[5]) for cell in cells if cell[0] == direction]
        assert each.pop() == pytest.approx(sum(each), abs=1e-3)
        assert sum(cell[0] == direction and cell[1] == "all" for cell in cells) == 1


def test_a_difference_is_paired_clip_by_clip():
    metric, base = torch.tensor([30.0, 20.0, 10.0]), torch.tensor([31.0, 21.0, 11.0])
    assert judge.mean_and_difference(metric, base) == "20.00 | −1.000 ± 0.000"
