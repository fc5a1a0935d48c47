"""The examples of the README and of docs/ run, and what they name exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from kvae_comfyui.benchmarks.memory_table import END, START, table
from kvae_comfyui.kvae.find import FILE_NAMES
from kvae_comfyui.training.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_python(text: str, folder: Path, hub: Path | None = None) -> str:
    """What all Python blocks of a page print, run one after the other as one script, offline.

    Args:
        hub: the cache of the Hugging Face hub.
    """
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    code = code.replace('"training/', f'"{ROOT.as_posix()}/training/')  # run elsewhere, since they may write files
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | ({"HF_HOME": str(hub)} if hub else {})
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_python_example_runs(tmp_path):
    assert run_python(README, tmp_path).strip() == "torch.Size([1, 3, 9, 64, 64])"


def test_the_line_for_the_real_weights_runs_as_it_stands(tmp_path):
    """With a hub's cache that holds the small KVAE under the real one's name, and a CPU where there is no GPU."""
    line = re.search(r'with the real one: (load_kvae\("KVAE-3D-1.0", torch.bfloat16, "cuda"\))', README)[1]
    folder = tmp_path / "hf" / "hub" / "models--kandinskylab--KVAE-3D-1.0"
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copyfile(
        ROOT / "training/tiny/assets/tiny_kvae.safetensors", folder / "snapshots" / ("0" * 40) / FILE_NAMES[0]
    )
    line = line if torch.cuda.is_available() else line.replace('"cuda"', '"cpu"')
    text, replaced = re.subn(r"\nkvae = load_kvae\(.*\)", f"\nkvae = {line}", README)
    assert replaced == 1
    assert run_python(text, tmp_path, tmp_path / "hf").strip() == "torch.Size([1, 3, 9, 64, 64])"


def test_the_examples_of_the_family_run(tmp_path):
    text = (ROOT / "docs" / "kvae.md").read_text(encoding="utf-8")
    plan, first, done, *_, refused = run_python(text, tmp_path).splitlines()
    assert plan.startswith(re.search(r"# (segments of .*?:)", text)[1])
    assert (first, done) == ("torch.Size([1, 3, 17, 64, 64])", "17")
    assert refused.startswith("the budget is 0.00 GB; the least memory this takes is ")


def test_every_option_named_exists(capsys):
    commands = re.findall(r"python -m training (\w+)((?:[^\n`]*\\\n)*[^\n`]*)", README)
    assert {name for name, _ in commands} >= {"extract", "train", "evaluate"}
    for name, rest in (each for each in commands if each[0] != "COMMAND"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", rest):
            assert option in shown


def test_links_and_files_exist():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/*.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            assert not link.partition("#")[0] or (page.parent / link.partition("#")[0]).exists(), f"{page}: {link}"
    for name in re.findall(r"`([\w/-]+\.(?:txt|py|md))`", README):
        assert (ROOT / name).exists() or name == "evaluation.txt"


def test_the_memory_table_is_what_is_planned():
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    assert page.split(START)[1].split(END)[0] == table()  # else run python -m benchmarks.memory_table
