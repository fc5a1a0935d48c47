"""`python -m training fetch` against a hub of our own on loopback: the real command, the real huggingface_hub."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save

from conftest import ROOT
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.fetch import name_of, source_of

pytest.importorskip("huggingface_hub")
TINY = ROOT / "training" / "tiny" / "assets" / "tiny_kvae.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves `files`, path → bytes, as the hub does, and notes what it is asked for and from where it sends.

    Attributes:
        stall: after so many bytes it sends no more; or
        cuts, cut: it breaks off there, each of the first times; there, every time after.
        takes_ranges: whether it gives parts of files.
        tag: what it says instead of a file's sha256.
        surplus: bytes that it sends after the file.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.paths = files, [], []
        self.stall = self.cut = self.tag = None
        self.cuts, self.takes_ranges, self.surplus = [], True, 0

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
        self.server.paths.append(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        start = start if self.server.takes_ranges else 0
        self.send_response(206 if start else 200)
        if not send or not self.server.surplus:
            self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", self.server.tag or f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if not send:
            return
        self.server.ranges.append(start)
        cut = self.server.cuts.pop(0) if self.server.cuts else self.server.cut
        stop = self.server.stall or cut or len(data)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[start:stop])
            for _ in range(self.server.surplus // 2**20):
                self.wfile.write(bytes(2**20))
            self.wfile.flush()
        self.close_connection = True
        if self.server.stall:
            self.rfile.read(1)  # until the other side goes away

    def log_message(self, *_):
        pass


LARGE = save({"decoder.mid.block_1.norm1.conv_y.weight": torch.arange(7_000_000.0)})  # more than one chunk of the hub's


SMALL = save({"decoder.mid.block_1.norm1.conv_y.weight": torch.arange(1_750_000.0)})  # less than one


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


@pytest.fixture
def fetch_here(hub, tmp_path, monkeypatch, capsys):
    """The command in this process, which is quicker: its code, what it prints, and what it says of errors."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for module in (constants, file_download):  # before 1.0 the second keeps what the first had when it was imported
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=module is constants)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def fetch(model="KVAE-3D-1.0"):
        code = main(["fetch", "--model", model, "--output", str(tmp_path / "models")])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error: ")]

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


def test_nothing_is_asked_of_the_hub_but_the_file(hub, fetch):
    code, _, err = fetch()
    assert code == 0, err
    assert set(hub.paths) == {"/kandinskylab/KVAE-3D-1.0/resolve/main/model.safetensors"}


def partial_of(tmp_path, data=None):
    """Where the parts of the KVAE lie, in a folder that is there."""
    folder = tmp_path / "models"
    folder.mkdir()
    tag = hashlib.sha256(data or TINY.read_bytes()).hexdigest()[:12]
    return folder / f"KVAE-3D-1.0.safetensors.{tag}.partial"


def test_a_body_that_does_not_end_is_broken_off(hub, fetch_here, tmp_path):
    hub.surplus = 2**34
    code, _, err = fetch_here()
    assert code == 2 and len(err) == 1
    assert f"sends more than the {TINY.stat().st_size:,} bytes it announced" in err[0]
    assert list((tmp_path / "models").iterdir()) == []
    hub.surplus = 0
    assert fetch_here()[0] == 0


def test_a_part_that_is_longer_than_the_file_is_thrown_away(fetch_here, tmp_path):
    partial_of(tmp_path).write_bytes(bytes(TINY.stat().st_size + 1))
    assert fetch_here()[0] == 0
    (file,) = (tmp_path / "models").iterdir()
    assert file.read_bytes() == TINY.read_bytes()


def test_parts_of_what_the_hub_had_before_are_swept(fetch_here, tmp_path):
    partial_of(tmp_path, b"another version").write_bytes(b"other bytes")
    assert fetch_here()[0] == 0
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["KVAE-3D-1.0.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="plants links and pipes, as POSIX has them")
@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_link_in_the_place_of_a_part_is_not_followed(fetch_here, tmp_path, plant):
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    plant(victim, partial_of(tmp_path))
    assert fetch_here()[0] == 0
    assert victim.read_bytes() == b"dear"
    (file,) = (tmp_path / "models").iterdir()
    assert not file.is_symlink() and file.read_bytes() == TINY.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="plants links and pipes, as POSIX has them")
def test_a_pipe_or_a_folder_in_the_place_of_a_part_or_of_the_file(fetch_here, tmp_path):
    partial = partial_of(tmp_path)
    os.mkfifo(partial)
    assert fetch_here()[0] == 0
    target = tmp_path / "models" / "KVAE-3D-1.0.safetensors"
    target.unlink()
    partial.mkdir()
    code, _, err = fetch_here()
    assert code == 2 and len(err) == 1
    partial.rmdir()
    target.mkdir()
    code, _, err = fetch_here()
    assert code == 2 and "this is a folder" in err[0]
    assert list((tmp_path / "models").iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_of_two_at_once_one_waits_for_the_other(hub, start, fetch_here, tmp_path):
    hub.stall = 20_000_000
    process = start(model := "someone/other/large.safetensors")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(p.stat().st_size for p in tmp_path.glob("models/*")):
        time.sleep(0.1)
    code, _, err = fetch_here(model)
    assert code == 2 and "another process downloads it" in err[0]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    hub.stall = None
    assert fetch_here(model)[0] == 0
    assert (tmp_path / "models" / "large.safetensors").read_bytes() == LARGE


def test_a_small_file_goes_on_too(hub, fetch_here, tmp_path):
    hub.cuts = [3_500_000, 6_500_000]
    hub.files["/someone/other/resolve/main/large.safetensors"] = SMALL
    code, tries = 2, 0
    while code == 2 and tries < 3:  # where huggingface_hub tries again by itself, one is enough
        code, _, err = fetch_here("someone/other/large.safetensors")
        tries += 1
    assert code == 0, err
    assert [start >> 20 for start in hub.ranges] == [0, 3, 6]
    assert (tmp_path / "models" / "large.safetensors").read_bytes() == SMALL


def test_a_server_without_parts_that_breaks_off_is_given_up(hub, fetch_here, tmp_path):
    hub.takes_ranges, hub.cut = False, 12_000_000
    code, _, err = fetch_here("someone/other/large.safetensors")
    assert code == 2 and len(err) == 1  # which line depends on whether huggingface_hub tries again by itself
    assert len(hub.ranges) < 5
    hub.takes_ranges, hub.cut = True, None
    assert fetch_here("someone/other/large.safetensors")[0] == 0
    assert (tmp_path / "models" / "large.safetensors").read_bytes() == LARGE


@pytest.mark.parametrize("tag", ['W/"a/b"', '"../../x"', f'"{"n" * 3000}"'])
def test_any_tag_will_do(hub, fetch_here, tag):
    hub.tag = tag
    code, out, err = fetch_here()
    assert code == 0, err
    assert "gives no hash" in out


def test_the_hash_of_files_that_git_holds_is_compared_too(hub, fetch_here, tmp_path):
    data = TINY.read_bytes()
    hub.tag = f'"{hashlib.sha1(f"blob {len(data)}".encode() + bytes(1) + data).hexdigest()}"'
    code, out, err = fetch_here()
    assert code == 0 and "gives no hash" not in out, err
    (tmp_path / "models" / "KVAE-3D-1.0.safetensors").unlink()
    hub.tag = f'"{"0" * 40}"'
    code, _, err = fetch_here()
    assert code == 2 and "what came is damaged" in err[0]
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("endpoint", ["http://[::1", "nonsense", "ftp://127.0.0.1", "http://127.0.0.1:99999", " "])
def test_an_endpoint_that_is_none_is_one_line(fetch, tmp_path, endpoint):
    code, _, err = fetch(HF_ENDPOINT=endpoint)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("models/*"))


def test_names():
    assert source_of("https://huggingface.co/a/b-c/resolve/main/d/e.safetensors") == ("a/b-c", "d/e.safetensors")
    assert name_of("kandinskylab/KVAE-3D-2.0-t4s8", "model.safetensors") == "KVAE-3D-2.0-t4s8.safetensors"
    assert name_of("a/b", "adapters/h2k.safetensors") == "h2k.safetensors"
    for bad in ("", "a/b", "a/b/../../c.safetensors", "a/b/c.pt", "a/b//c.safetensors", "-a/b/c.safetensors"):
        with pytest.raises(UserError, match="expected"):
            source_of(bad)


def test_it_needs_none_of_what_training_needs():
    code = (
        "import sys; sys.path.insert(0, '.'); from kvae_comfyui.training.cli import main\n"
        "main(['fetch', '--model', 'nonsense', '--output', 'x'])\n"
        "assert not {'diffusers', 'av', 'matplotlib', 'torchmetrics', 'zstandard'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
