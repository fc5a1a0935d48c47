"""The README's example runs, and what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvae_comfyui.training.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace('"training/', f'"{ROOT.as_posix()}/training/')  # run elsewhere, since it writes a file
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "torch.Size([1, 3, 9, 64, 64])"


def test_every_option_named_exists(capsys):
    commands = re.findall(r"python -m training (\w+)((?:[^\n`]*\\\n)*[^\n`]*)", README)
    assert {name for name, _ in commands} >= {"extract", "train", "evaluate"}
    for name, rest in commands:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", rest):
            assert option in shown


def test_links_and_files_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists()
    for name in re.findall(r"`([\w/-]+\.(?:txt|py|md))`", README):
        assert (ROOT / name).exists() or name == "evaluation.txt"
