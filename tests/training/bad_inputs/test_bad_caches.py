"""check-cache refuses what it cannot check, and reports damaged files one by one, whatever is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import needs
from bad_rows import CPU, NESTED, NO_OBJECTS, Plant, Row, check, container, make_job
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.musubi.cache_files import write_cache

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

CHECK = "check-cache {d}/c" + CPU
NAME = "a_00000-005_0064x0048_hv.safetensors"
WITH = " --dataset-config {d}/a.json"


def cache(folder: Path, name: str = NAME) -> None:
    folder.mkdir(exist_ok=True)
    write_cache(folder / name, CACHED["hunyuan_video"], 2.1 * torch.randn(16, 2, 6, 8), 64, 48, 5)
    save_file({"x_float16": torch.zeros(3)}, folder / "a_hv_te.safetensors")


def dataset(cache_directory: str = "c") -> Plant:
    """A cache folder, and a config that names another one unless it is told not to."""

    def plant(d: Path, job: Path) -> None:
        cache(d / "c")
        places = {"video_directory": f"{job}/videos", "cache_directory": str(d / cache_directory)}
        (d / "a.json").write_text(json.dumps({"datasets": [places | {"caption_extension": ".txt"}]}))

    return plant


def one(d: Path, job: Path) -> None:
    cache(d / "c")


REFUSED = [
    Row("check-cache" + CPU, "required: DIR"),
    Row("check-cache ''" + CPU, "DIR is empty"),
    Row("check-cache {d}/absent" + CPU, "No such file"),
    Row("check-cache {d}/{nul}" + CPU, "not a name that a file can have"),
    Row("check-cache {d}/c/" + NAME + CPU, "is a file; choose a folder", one),
    Row(CHECK, "no latent caches", lambda d, job: (d / "c").mkdir()),
    Row(CHECK + " --repair", "--repair needs --dataset-config", one),
    Row(CHECK + WITH + " --repair", "--repair needs --dataset-config, and --hunyuan-vae", dataset()),
    Row(CHECK + WITH, "no such file", one),
    Row(CHECK + WITH, "no dataset has the cache_directory", dataset("other")),
    Row(CHECK + WITH, "no caption (.txt)", dataset()),
    Row(CHECK + " --encoder other", "invalid choice", one),
    *(Row(f"{CHECK} --memory-gb {x}", "--memory-gb is", one) for x in ("nan", "-1", "inf")),
    *(Row(CHECK + " --dataset-config " + name, "expected a .toml or a .json file", one) for name in ("{d}/c", "x.txt")),
]


@pytest.mark.parametrize("row", REFUSED, ids=Row.name)
def test_what_cannot_be_checked_is_refused(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


def header(entries: dict) -> bytes:
    return container(json.dumps(entries).encode())


def tensor(shape: list, dtype: str = "F16", end: int = 0) -> dict:
    return {"latents_2x6x8_float16": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


OURS = {"__metadata__": {"architecture": "hunyuan_video", "frame_count": "5", "width": "64", "height": "48"}}
DAMAGED = [
    b"",
    b"\0" * 7,
    (2**63).to_bytes(8, "little"),
    container(b"{"),
    *(container(text.encode()) for text in NO_OBJECTS),
    container(f'{{"x": {NESTED}'.encode()),
    header({}),
    header(OURS),
    header({"__metadata__": {"architecture": "x" * 10_000}}),
    header(OURS | tensor([0])),
    header(OURS | tensor([16, 0, 6, 8])),
    header(OURS | tensor([16, 2, 0, 0])),
    header(OURS | tensor([2**62, 2**62, 2, 2])),
    header(OURS | tensor([16, 2, 6, 8], end=2**40)),
    header(OURS | tensor([16, -2, 6, 8])),
    header(OURS | tensor([], "I64")),
    container(json.dumps(OURS | tensor([16, 2, 6, 8], "I16", 3072)).encode(), b"\0" * 3072),
    container(json.dumps(OURS | tensor([16, 2, 6, 8], end=3072)).encode(), b"\xff" * 3072),  # NaN
    header(OURS | {f"latents_{'9' * 5000}x1x1_float16": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}),
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_cache_is_one_line(content, tmp_path, capsys):
    cache(tmp_path)
    cache(tmp_path, "a_00005-005_0064x0048_hv.safetensors")
    (tmp_path / NAME).write_bytes(content)
    assert main(["check-cache", str(tmp_path)]) == 1
    (line, *_) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{NAME}: ")
    assert len(line) < 600


@pytest.mark.parametrize(
    "name",
    [
        "a_00000-000_0064x0048_hv.safetensors",
        "a_00000-005_0000x0000_hv.safetensors",
        f"a_00000-{'9' * 60}_0064x0048_hv.safetensors",
        f"a_{'9' * 60}x1_hv.safetensors",
        "_hv.safetensors",
        "a\nb_hv.safetensors",
        os.fsdecode(b"caf\xe9_hv.safetensors"),
    ],
    ids=range(7),
)
def test_a_name_that_cannot_be_is_one_line(name, tmp_path, capsys):
    cache(tmp_path)
    (tmp_path / NAME).rename(tmp_path / name)
    assert main(["check-cache", str(tmp_path)]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert "hv.safetensors: " in first
    assert len(rest) <= 3


def test_what_is_not_a_file_is_one_line(tmp_path, capsys):
    cache(tmp_path)
    os.mkfifo(tmp_path / "pipe_0064x0048_hv.safetensors")
    (tmp_path / "loop_0064x0048_hv.safetensors").symlink_to(tmp_path / "loop_0064x0048_hv.safetensors")
    (tmp_path / "gone_hv_te.safetensors").symlink_to(tmp_path / "absent")
    assert main(["check-cache", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "pipe_0064x0048_hv.safetensors: this is a pipe" in out
    assert "loop_0064x0048_hv.safetensors: Too many levels" in out
    assert "gone_hv_te.safetensors: no such file" in out
