"""A model is found by its path or by its name on the hub; a failed search is an error of one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import needs
from conftest import ROOT
from kvae_comfyui.kvae import WeightsError, load_kvae


def in_cache(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """Put a repository into the cache of a hub."""
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, data in files.items():
        (folder / "snapshots" / ("0" * 40) / name).write_bytes(data)


FIND = """
import sys
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.kvae.find import find_weights

for name in sys.argv[1:]:
    try:
        print("->", find_weights(name))
    except WeightsError as error:
        print("->", error)
"""


def find(names: list[str], folder: Path, **env: str) -> list[str]:
    """What a process with the hub's cache in that folder finds for each name, or its error."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = clean | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", FIND, *names], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.findall("^-> (.*)$", done.stdout, re.MULTILINE)


def test_names_of_published_models_mean_their_repositories(tmp_path):
    needs.package("huggingface_hub", "requirements-training.txt")
    in_cache(tmp_path / "hf", "kandinskylab/KVAE-3D-1.0", {"model.safetensors": b"x", "config.json": b"{}"})
    in_cache(tmp_path / "hf", "kandinskylab/KVAE-3D-2.0-t4s8", {"model.safetensors": b"x"})
    mine = tmp_path / "KVAE-3D-2.0-t4s8"
    mine.mkdir()
    (mine / "model.safetensors").write_bytes(b"mine")
    name, repository, local = find(["KVAE-3D-1.0", "kandinskylab/KVAE-3D-1.0", mine.name], tmp_path)
    assert name == repository
    assert name.startswith(str(tmp_path / "hf")) and name.endswith("model.safetensors")
    assert local == os.path.join("KVAE-3D-2.0-t4s8", "model.safetensors")  # a local folder comes first


def test_a_failed_search_is_an_error_of_one_line(tmp_path):
    needs.package("huggingface_hub", "requirements-training.txt")
    expected = {
        "KVAE-3D-2.0-t4s8": "kandinskylab/KVAE-3D-2.0-t4s8: no such file or folder, and the hub says",
        "someone/" + "x" * 120: "and the hub says",
        "-x/y": "give a .safetensors file, a folder, KVAE-3D-1.0",
        "x" * 5000: "choose a shorter name",
        "nonsense": "no such file or folder; give",
    }
    for said, words in zip(find(list(expected), tmp_path), expected.values(), strict=True):
        assert words in said
    with pytest.raises(WeightsError, match="not a name that a file can have"):
        load_kvae("a\0b")


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://[::1", "nonsense", "ftp://127.0.0.1", "http://127.0.0.1:99999", " "]
)
def test_a_bad_endpoint_is_an_error_of_one_line(tmp_path, endpoint):
    needs.package("huggingface_hub", "requirements-training.txt")
    (said,) = find(["someone/else"], tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert said.startswith("someone/else: no such file or folder, and ") and "HF_ENDPOINT is" in said
