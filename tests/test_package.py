"""The package that ComfyUI users download: the tracked files that .comfyignore does not leave out."""

import shutil
import subprocess

import pytest

import needs
from conftest import ROOT

ASSETS = "training/tiny/assets/"


def tracked(*options: str) -> set[str]:
    """Tracked files, or those that options of `git ls-files` select."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return set(done.stdout.split("\0")) - {""}


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason=needs.GIT)
def test_the_package_has_what_the_nodes_need_and_is_small():
    package = tracked() - tracked("--ignored", "--cached", "--exclude-from=.comfyignore")
    assert {file for file in package if file.startswith(ASSETS)} == {
        *(f"{ASSETS}tiny_{name}.safetensors" for name in ("kvae", "hunyuan_to_kvae", "kvae_to_hunyuan")),
        *(f"{ASSETS}tiny_{name}.safetensors" for name in ("kvae_t4s16", "hunyuan15_to_kvae", "kvae_to_hunyuan15")),
    }
    assert not [file for file in package if file.split("/")[0] in ("tests", "benchmarks", "examples", ".ci")]
    assert sum((ROOT / file).stat().st_size for file in package) < 23e6
