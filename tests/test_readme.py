"""The examples in README and docs run; the commands, options, files, headings and benches that they name exist."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from kvae_comfyui.benchmarks.memory_table import END, START, table
from kvae_comfyui.kvae.hub import WEIGHTS_FILES
from kvae_comfyui.training.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("web/docs/*.md")]


def run_python(text: str, folder: Path, hub: Path | None = None) -> str:
    """Run all Python blocks of a page, in order, as one offline script; returns what they print.

    Args:
        hub: a folder to use as the cache of the Hugging Face hub.
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
    """The hub's cache holds the small KVAE under the name of the real one; without a GPU the line says "cpu"."""
    line = re.search(r'with the real one: (load_kvae\("KVAE-3D-1.0", torch.bfloat16, "cuda"\))', README)[1]
    folder = tmp_path / "hf" / "hub" / "models--kandinskylab--KVAE-3D-1.0"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copyfile(ROOT / "training/tiny/assets/tiny_kvae.safetensors", snapshot / WEIGHTS_FILES[0])
    line = line if torch.cuda.is_available() else line.replace('"cuda"', '"cpu"')
    text, replaced = re.subn(r"\nkvae = load_kvae\(.*\)", f"\nkvae = {line}", README)
    assert replaced == 1
    assert run_python(text, tmp_path, tmp_path / "hf").strip() == "torch.Size([1, 3, 9, 64, 64])"


def test_the_examples_of_the_family_run(tmp_path):
    text = (ROOT / "docs" / "kvae.md").read_text(encoding="utf-8")
    sizes, first, done, second, all_done, plan, refused = run_python(text, tmp_path).splitlines()
    assert sizes == "torch.Size([1, 16, 6, 8, 8]) torch.Size([1, 3, 20, 60, 64])"
    assert (first, done) == ("torch.Size([1, 3, 17, 64, 64])", "17")
    assert (second, all_done) == ("torch.Size([1, 3, 4, 64, 64])", "21")
    assert plan.startswith(re.search(r"# (16-frame segments.*?;)", text)[1])
    assert refused.startswith("this clip needs at least ")


def test_the_example_of_the_adapters_runs(tmp_path):
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert run_python(text, tmp_path).startswith("hunyuan_video → kvae_3d_1.0, Residual, 265,504 weights")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page, capsys):
    commands = re.findall(r"-m training ([\w-]+)((?:[^\n`]*\\\n)*[^\n`]*)", page.read_text(encoding="utf-8"))
    for name, rest in (each for each in commands if each[0] != "COMMAND"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        ours, *_ = re.split(r"\S+\.py", rest)  # what follows a script of another program is for it
        for option in re.findall(r"--[\w-]+", ours):
            assert option in shown, f"{name} {option}"


def test_benches_and_options_that_pages_name_exist():
    for page in PAGES:
        for name, rest in re.findall(r"-m benchmarks\.(\w+)([^`\n]*)", page.read_text(encoding="utf-8")):
            module = ROOT / "benchmarks" / name
            file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
            source = file.read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", rest):
                assert f'"{option}"' in source, f"{page}: {name} {option}"


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.py")), ids=lambda file: file.stem)
def test_options_that_an_example_names_exist(example, capsys):
    found = re.findall(r"-m examples\.(\w+)((?:[^\n`]*\\\n)*[^\n`]*)", example.read_text(encoding="utf-8"))
    assert found or example.stem in ("__init__", "common")
    for name, rest in found:
        with pytest.raises(SystemExit):
            import_module(f"kvae_comfyui.examples.{name}").main(["--help"])
        shown = capsys.readouterr().out
        assert name == example.stem
        assert all(option in shown for option in re.findall(r"--[\w-]+", rest)), rest


def anchors(page: Path) -> set[str]:
    """Headings of a page, spelt as in links on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_files_that_pages_name_exist():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = link.partition("#")
            assert (page.parent / file).exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(page.parent / file if file else page), f"{page}: {link}"
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`([\w/-]+\.(?:txt|py|md|json))`", page.read_text(encoding="utf-8")):
            made_up = "NAME" in name or "KVAEName" in name or name in ("evaluation.txt", "report.json")
            assert made_up or (ROOT / name).exists(), f"{page}: {name}"


def test_the_memory_table_is_that_of_the_planner():
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    assert page.split(START)[1].split(END)[0] == table()  # else run python -m benchmarks.memory_table
