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
from kvae_comfyui.kvae.find import says_kvae


def in_cache(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """Put a repository into the cache of a hub."""
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, data in files.items():
        place = folder / "snapshots" / ("0" * 40) / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)


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


def test_the_vae_of_a_pipeline_is_in_its_folder_vae(tmp_path):
    needs.package("huggingface_hub", "requirements-training.txt")
    file = "vae/diffusion_pytorch_model.safetensors"
    in_cache(tmp_path / "hf", "kandinskylab/Kandinsky-6.0-VSR-5s-Diffusers", {file: b"x", "model_index.json": b"{}"})
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / file).write_bytes(b"x")
    (tmp_path / "pipeline" / "transformer").mkdir()
    hub, local, other = find(
        ["kandinskylab/Kandinsky-6.0-VSR-5s-Diffusers", "pipeline", os.path.join("pipeline", "transformer")], tmp_path
    )
    assert hub.startswith(str(tmp_path / "hf")) and hub.endswith(
        os.path.join("vae", "diffusion_pytorch_model.safetensors")
    )
    assert local == os.path.join("pipeline", "vae", "diffusion_pytorch_model.safetensors")
    assert other.endswith("nor does its vae/")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"vae_type": "video-kvae", "ch": 128}', True),
        ('{"_class_name": "Kandinsky6SRVAE"}', True),
        ('{"_class_name": "AutoencoderKLKVAEVideo"}', True),
        ('{"_class_name": "AutoencoderKLKVAE", "ch_mult": [1, 2, 4, 8]}', False),
        ('{"_class_name": "AutoencoderDC", "encoder_block_out_channels": [8, 8]}', False),
        ('{"vae_type": ["video-kvae"]}', False),
        ('{"_class_name": ["Kandinsky6SRVAE"]}', False),
        ('{"vae_type": "video-kvae"}' + " " * (1 << 16), False),
        ("[]", False),
        ("[" * 60_000, False),
        ("{", False),
        (None, False),
    ],
)
def test_a_pipelines_config_tells_a_kvae_from_other_vaes(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert says_kvae(tmp_path / "diffusion_pytorch_model.safetensors") is says


def test_a_failed_search_is_an_error_of_one_line(tmp_path):
    needs.package("huggingface_hub", "requirements-training.txt")
    expected = {
        "KVAE-3D-2.0-t4s8": "kandinskylab/KVAE-3D-2.0-t4s8: no such file or folder, and the hub says",
        "someone/" + "x" * 120: "and the hub says",
        "-x/y": "or the name of a published KVAE (KVAE-3D-1.0",
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
