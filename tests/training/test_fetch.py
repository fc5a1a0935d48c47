"""`python -m training fetch` as a user runs it, with the real huggingface_hub and a hub on loopback."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save

import command
import needs
from conftest import ROOT
from fake_hub import running
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.fetch import local_name, parse_model

needs.package("huggingface_hub", "requirements-training.txt")
KVAE = (ROOT / "training" / "tiny" / "assets" / "tiny_kvae.safetensors").read_bytes()
LARGE = save({"decoder.mid.block_1.norm1.conv_y.weight": torch.arange(7_000_000.0)})


@pytest.fixture
def hub():
    files = {
        "/kandinskylab/KVAE-3D-1.0/resolve/main/model.safetensors": KVAE,
        "/someone/other/resolve/main/large.safetensors": LARGE,
        "/someone/other/resolve/main/dir/wrong.safetensors": save({"x": torch.randn(8)}),
    }
    with running(files) as hub:
        yield hub


@pytest.fixture
def start(hub, tmp_path):
    """Start the command, with an empty hub cache."""

    def start(model="KVAE-3D-1.0", **env):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"} | env
        return command.start("fetch", "--model", model, "--output", tmp_path / "models", env=env)

    return start


@pytest.fixture
def fetch(start):
    """Run the command: its exit code, standard output and standard error."""

    def fetch(*args, **env):
        process = start(*args, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return fetch


def test_a_kvae_is_saved_under_the_models_name_and_only_its_file_is_requested(hub, fetch, tmp_path):
    code, out, err = fetch()
    assert code == 0, err
    assert f"{len(KVAE) / 1e9:.2f} GB" in out.splitlines()[0]
    assert out.splitlines()[-1].endswith("KVAE-3D-1.0.safetensors: a KVAE-3D")
    (file,) = (tmp_path / "models").iterdir()
    assert file.name == "KVAE-3D-1.0.safetensors"
    assert file.read_bytes() == KVAE
    assert {path for _, path, _ in hub.requests} == {"/kandinskylab/KVAE-3D-1.0/resolve/main/model.safetensors"}


def test_a_killed_download_continues(hub, start, fetch, tmp_path):
    hub.stall = 20_000_000
    process = start(model := "someone/other/large.safetensors")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(p.stat().st_size for p in tmp_path.glob("models/*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (partial,) = (tmp_path / "models").iterdir()
    assert partial.suffix == ".partial"
    have, hub.stall, hub.starts = partial.stat().st_size, None, []
    code, out, err = fetch(model)
    assert code == 0, err
    assert "already downloaded" in out.splitlines()[0]
    assert hub.starts == [have] and have > 0
    (file,) = (tmp_path / "models").iterdir()
    assert file.read_bytes() == LARGE


def test_the_hubs_cache_and_offline_mode_are_respected(hub, fetch, tmp_path):
    code, _, err = fetch(HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in err and "by hand" in err
    revision = "0" * 40
    cache = tmp_path / "hf" / "hub" / "models--kandinskylab--KVAE-3D-1.0"
    (cache / "snapshots" / revision).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    (cache / "snapshots" / revision / "model.safetensors").write_bytes(KVAE)
    code, out, err = fetch(HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert "from the cache" in out
    assert (tmp_path / "models" / "KVAE-3D-1.0.safetensors").read_bytes() == KVAE
    code, out, _ = fetch()
    assert (code, "already exists" in out, hub.requests) == (0, True, [])


def test_every_error_is_one_line(fetch, tmp_path):
    for model, message in (
        ("someone/other/dir/wrong.safetensors", "not a file this project knows; expected a KVAE-3D VAE or a latent"),
        ("someone/other/absent.safetensors", "check the name and the network"),
        ("someone/other--/x.safetensors", "error: --model someone/other--/x.safetensors: "),
    ):
        code, _, err = fetch(model)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
    code, _, err = fetch("adapters", HF_HUB_OFFLINE="1")
    assert (code, err.count("\n")) == (2, 1)
    assert "HF_HUB_OFFLINE is set" in err and "raw.githubusercontent.com" in err
    (tmp_path / "models" / "KVAE-3D-1.0.safetensors").mkdir()
    code, _, err = fetch()
    assert (code, "this is a folder" in err) == (2, True)


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://[::1", "nonsense", "ftp://127.0.0.1", "http://127.0.0.1:99999", " "]
)
def test_an_endpoint_without_a_hub_is_an_error_of_one_line(fetch, tmp_path, endpoint):
    code, _, err = fetch(HF_ENDPOINT=endpoint)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "HF_ENDPOINT is set" in err
    assert not list(tmp_path.glob("models/*"))


def test_names_of_models_and_files_are_parsed():
    assert parse_model("KVAE-3D-1.0") == ("kandinskylab/KVAE-3D-1.0", "model.safetensors")
    assert parse_model("https://huggingface.co/a/b-c/resolve/main/d/e.safetensors") == ("a/b-c", "d/e.safetensors")
    assert local_name("kandinskylab/KVAE-3D-2.0-t4s8", "model.safetensors") == "KVAE-3D-2.0-t4s8.safetensors"
    assert local_name("a/b", "adapters/h2k.safetensors") == "h2k.safetensors"
    for bad in ("", "a/b", "a/b/../../c.safetensors", "a/b/c.pt", "a/b//c.safetensors", "-a/b/c.safetensors"):
        with pytest.raises(UserError, match="expected"):
            parse_model(bad)


def test_fetch_imports_none_of_the_packages_that_training_needs():
    code = (
        "import sys; sys.path.insert(0, '.'); from kvae_comfyui.training.cli import main\n"
        "main(['fetch', '--model', 'nonsense', '--output', 'x'])\n"
        "assert not {'diffusers', 'av', 'matplotlib', 'torchmetrics', 'zstandard'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
