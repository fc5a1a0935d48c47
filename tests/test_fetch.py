"""`python -m training fetch` against a hub of our own on loopback: the real command, the real huggingface_hub."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.fetch import name_of, source_of

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "training" / "assets" / "tiny_kvae.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves `files`, path → bytes, as the hub does; notes from where it sends, and stalls after `stall` of them."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.stall = files, [], None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send: bool):
        data = self.server.files.get(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if not send:
            return
        self.server.ranges.append(start)
        stop = self.server.stall or len(data)
        self.wfile.write(data[start:stop])
        self.wfile.flush()
        if self.server.stall:
            self.rfile.read(1)  # until the other side goes away

    def log_message(self, *_):
        pass


LARGE = save({"decoder.mid.block_1.norm1.conv_y.weight": torch.arange(7_000_000.0)})  # more than one chunk of the hub's


@pytest.fixture
def hub():
    files = {
        "/kandinskylab/KVAE-3D-1.0/resolve/main/model.safetensors": TINY.read_bytes(),
        "/someone/other/resolve/main/large.safetensors": LARGE,
        "/someone/other/resolve/main/dir/wrong.safetensors": save({"x": torch.randn(8)}),
    }
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def start(hub, tmp_path):
    """Start the command as a user does, with a hub cache of its own."""

    def start(model="KVAE-3D-1.0", **env):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"} | env
        command = [sys.executable, "-m", "training", "fetch", "--model", model, "--output", str(tmp_path / "models")]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )

    return start


@pytest.fixture
def fetch(start):
    def fetch(*args, **env):
        process = start(*args, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return fetch


def test_a_kvae_comes_under_its_own_name_after_its_size_is_said(fetch, tmp_path):
    code, out, err = fetch()
    assert code == 0, err
    assert f"{TINY.stat().st_size / 1e9:.2f} GB" in out.splitlines()[0]
    assert out.splitlines()[-1].endswith("KVAE-3D-1.0.safetensors: a KVAE-3D")
    (file,) = (tmp_path / "models").iterdir()
    assert file.name == "KVAE-3D-1.0.safetensors"
    assert file.read_bytes() == TINY.read_bytes()


def test_an_interrupted_download_goes_on(hub, start, fetch, tmp_path):
    hub.stall = 20_000_000
    process = start(model := "someone/other/large.safetensors")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(p.stat().st_size for p in tmp_path.glob("models/*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (partial,) = (tmp_path / "models").iterdir()
    assert partial.suffix == ".partial"
    have, hub.stall, hub.ranges = partial.stat().st_size, None, []
    code, out, err = fetch(model)
    assert code == 0, err
    assert "are here" in out.splitlines()[0]
    assert hub.ranges == [have] and have > 0
    (file,) = (tmp_path / "models").iterdir()
    assert file.read_bytes() == LARGE


def test_a_damaged_download_is_thrown_away(hub, fetch, tmp_path):
    tag = hashlib.sha256(TINY.read_bytes()).hexdigest()[:12]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"KVAE-3D-1.0.safetensors.{tag}.partial").write_bytes(b"other bytes")
    code, _, err = fetch()
    assert code == 2
    assert "what came is damaged" in err
    assert list((tmp_path / "models").iterdir()) == []


def test_the_cache_of_the_hub_is_used_and_offline_mode_is_kept(hub, fetch, tmp_path):
    code, _, err = fetch(HF_HUB_OFFLINE="1")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in err and "by hand" in err
    revision = "0" * 40
    cache = tmp_path / "hf" / "hub" / "models--kandinskylab--KVAE-3D-1.0"
    (cache / "snapshots" / revision).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    (cache / "snapshots" / revision / "model.safetensors").write_bytes(TINY.read_bytes())
    code, out, err = fetch(HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert "from the cache" in out
    assert hub.ranges == []
    assert (tmp_path / "models" / "KVAE-3D-1.0.safetensors").read_bytes() == TINY.read_bytes()
    code, out, _ = fetch()
    assert (code, "is there already" in out, hub.ranges) == (0, True, [])


def test_what_goes_wrong_is_one_line(fetch, tmp_path):
    for model, message in (
        ("someone/other/dir/wrong.safetensors", "not a file this project knows; expected a KVAE-3D VAE or a latent"),
        ("someone/other/absent.safetensors", "check the name and the network"),
    ):
        code, _, err = fetch(model)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
    code, _, err = fetch(HF_ENDPOINT="http://127.0.0.1:9")
    assert (code, "check the name and the network" in err, "Traceback" in err) == (2, True, False)
    assert not list(tmp_path.glob("models/*"))


def test_names():
    assert source_of("https://huggingface.co/a/b-c/resolve/main/d/e.safetensors") == ("a/b-c", "d/e.safetensors")
    assert name_of("kandinskylab/KVAE-3D-2.0-t4s8", "model.safetensors") == "KVAE-3D-2.0-t4s8.safetensors"
    assert name_of("a/b", "adapters/h2k.safetensors") == "h2k.safetensors"
    for bad in ("", "a/b", "a/b/../../c.safetensors", "a/b/c.pt"):
        with pytest.raises(UserError, match="expected"):
            source_of(bad)


def test_it_needs_none_of_what_training_needs():
    code = (
        "import sys; sys.path.insert(0, '.'); from kvae_comfyui.training.cli import main\n"
        "main(['fetch', '--model', 'nonsense', '--output', 'x'])\n"
        "assert not {'diffusers', 'av', 'matplotlib', 'torchmetrics', 'zstandard'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
