"""Downloads over HTTP continue after a break, are limited in size, and get their final name only after a check."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import save

import needs
from conftest import ROOT
from fake_hub import running
from kvae_comfyui.adapters import published
from kvae_comfyui.adapters.networks import PointwiseNet
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training import fetch
from kvae_comfyui.training.download import CHUNK_BYTES, MAX_FAILURES, open_partial
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.fetch import FetchConfig, download

needs.package("huggingface_hub", "requirements-training.txt")
KVAE = (ROOT / "training" / "tiny" / "assets" / "tiny_kvae.safetensors").read_bytes()
LARGE = save({"decoder.mid.block_1.norm1.conv_y.weight": torch.arange(7_000_000.0)})
OTHER = save({"x": torch.randn(8)})


@pytest.fixture
def hub():
    with running({"/kvae": KVAE, "/large": LARGE, "/other": OTHER}) as hub:
        yield hub


@pytest.fixture
def target(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "kvae.safetensors"


@pytest.fixture
def get(hub, target, monkeypatch):
    """Download a file of the hub to the target."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return lambda file="kvae": download(f"{hub.url}/{file}", target)


def partial_of(target, data=KVAE):
    return target.with_name(f"{target.name}.{hashlib.sha256(data).hexdigest()[:12]}.partial")


def names_in_folder(target):
    return [path.name for path in target.parent.iterdir()]


def test_a_download_prints_its_size_first_and_leaves_no_other_file(get, target, capsys):
    assert get() == "a KVAE-3D"
    assert f"{len(KVAE) / 1e9:.2f} GB" in capsys.readouterr().out.splitlines()[0]
    assert target.read_bytes() == KVAE
    assert names_in_folder(target) == [target.name]


def test_a_broken_connection_is_reopened_where_it_broke(hub, get, target):
    hub.cuts = [3_500_000, 6_500_000]
    get("large")
    first, second, third = hub.starts
    assert first == 0 and 0 <= 3_500_000 - second < CHUNK_BYTES and 0 <= 6_500_000 - third < CHUNK_BYTES
    assert target.read_bytes() == LARGE


def test_a_download_stops_after_too_many_broken_connections_and_can_continue(hub, get, target, capsys):
    hub.cut = 12_000_000
    with pytest.raises(UserError, match="run the same command again to continue"):
        get("large")
    assert len(hub.starts) == 1 + MAX_FAILURES
    have = partial_of(target, LARGE).stat().st_size
    assert names_in_folder(target) == [partial_of(target, LARGE).name]
    hub.cut, hub.starts = None, []
    get("large")
    assert hub.starts == [have] and have > 11_000_000
    assert "0.01 GB of it already downloaded" in capsys.readouterr().out
    assert target.read_bytes() == LARGE


def test_a_server_without_ranges_is_read_from_the_start(hub, get, target):
    hub.accepts_ranges, hub.cut = False, 12_000_000
    with pytest.raises(UserError, match="run the same command again"):
        get("large")
    assert len(hub.starts) == 1 + MAX_FAILURES
    hub.cut = None
    get("large")
    assert target.read_bytes() == LARGE


def test_a_download_stops_if_the_server_sends_more_than_it_announced(hub, get, target):
    hub.surplus = 2**34
    with pytest.raises(UserError, match=f"sends more than the {len(KVAE):,} bytes it announced"):
        get()
    assert names_in_folder(target) == []
    hub.surplus = 0
    get()
    assert target.read_bytes() == KVAE


def test_a_damaged_or_foreign_file_is_deleted(get, target):
    partial_of(target).write_bytes(b"other bytes")
    with pytest.raises(UserError, match="the downloaded file is damaged"):
        get()
    assert names_in_folder(target) == []
    with pytest.raises(UserError, match="/other: this is not a file this project knows; expected a KVAE-3D VAE or a"):
        get("other")
    assert names_in_folder(target) == []


def test_a_partial_file_longer_than_the_file_is_emptied(get, target):
    partial_of(target).write_bytes(bytes(len(KVAE) + 1))
    get()
    assert target.read_bytes() == KVAE


def test_the_partial_file_of_an_earlier_version_is_deleted(get, target):
    partial_of(target, b"another version").write_bytes(b"other bytes")
    get()
    assert names_in_folder(target) == [target.name]


@needs.posix
def test_one_process_at_a_time_downloads_to_a_target(get, target):
    tag = hashlib.sha256(KVAE).hexdigest()
    with open_partial(target, tag, len(KVAE)), pytest.raises(UserError, match="another process is downloading it"):
        get()
    get()
    assert names_in_folder(target) == [target.name]


@needs.posix
@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_link_in_place_of_the_partial_file_is_not_followed(get, target, tmp_path, plant):
    (tmp_path / "victim").write_bytes(b"dear")
    plant(tmp_path / "victim", partial_of(target))
    get()
    assert (tmp_path / "victim").read_bytes() == b"dear"
    assert not target.is_symlink() and target.read_bytes() == KVAE


@needs.posix
def test_a_pipe_in_place_of_the_partial_file_is_replaced_and_a_folder_refused(get, target):
    os.mkfifo(partial_of(target))
    get()
    assert target.read_bytes() == KVAE
    target.unlink()
    partial_of(target).mkdir()
    with pytest.raises(WeightsError, match="partial: "):
        get()


@pytest.mark.parametrize("tag", ['W/"a/b"', '"../../x"', f'"{"n" * 3000}"'])
def test_without_a_hash_only_the_size_is_compared(hub, get, target, capsys, tag):
    hub.tag = tag
    get()
    assert "the hub gives no hash of this file; only its size was compared" in capsys.readouterr().out
    assert names_in_folder(target) == [target.name]


def test_the_hash_of_files_that_git_stores_is_compared_too(hub, get, target, capsys):
    hub.tag = f'"{hashlib.sha1(f"blob {len(KVAE)}".encode() + bytes(1) + KVAE).hexdigest()}"'
    get()
    assert "gives no hash" not in capsys.readouterr().out
    hub.tag = f'"{"0" * 40}"'
    with pytest.raises(UserError, match="the downloaded file is damaged"):
        get()


def test_a_token_goes_to_the_hub_and_not_where_the_hub_redirects(hub, get, target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running({"/stored": KVAE}) as storage:
        hub.redirects["/kvae"] = f"http://localhost:{storage.server_port}/stored"  # another host than 127.0.0.1
        get()
        assert {token for *_, token in hub.requests} == {"Bearer hf_secret"}
        assert storage.requests == [("GET", "/stored", None)]
    assert target.read_bytes() == KVAE


@pytest.fixture
def github(monkeypatch):
    """A stand-in for GitHub, with two adapters in the place of the published ones."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    files = {name: save(PointwiseNet(16, 16).state_dict()) for name in published.PUBLISHED_FILES}
    with running({f"/{name}": data for name, data in files.items()}) as github:
        monkeypatch.setattr(published, "FOLDER", github.url)
        monkeypatch.setattr(fetch, "SIZE", len(files["adapter_hunyuan_to_kvae3d.safetensors"]))
        for name, data in files.items():
            monkeypatch.setitem(published.SHA256, name, hashlib.sha256(data).hexdigest())
        yield github


def fetch_adapters(target):
    return fetch.run(FetchConfig(model="adapters", output=str(target.parent)))


def test_both_published_adapters_are_fetched_without_a_token(github, target, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    github.tag = 'W/"' + "0" * 64 + '"'  # GitHub's tags are no hashes of the content
    assert fetch_adapters(target) == 0
    assert {f"/{path.name}": path.read_bytes() for path in target.parent.iterdir()} == github.files
    assert {token for *_, token in github.requests} == {None}
    assert [line for line in capsys.readouterr().out.splitlines() if "a latent adapter" in line and "→" in line]
    github.requests.clear()
    assert fetch_adapters(target) == 0
    assert github.requests == []


def test_an_adapter_with_other_bytes_than_the_published_one_is_not_kept(github, target):
    name = "adapter_hunyuan_to_kvae3d.safetensors"
    github.files[f"/{name}"] = bytes(len(github.files[f"/{name}"]))
    with pytest.raises(UserError, match=f"{name}: the downloaded file is damaged"):
        fetch_adapters(target)
    assert names_in_folder(target) == []


def test_the_published_adapters_are_pinned_to_one_commit():
    for name, digest in published.SHA256.items():
        address = published.published_address(name)
        assert address.startswith("https://raw.githubusercontent.com/") and published.COMMIT in address
        assert len(digest) == 64 and name in published.PUBLISHED_FILES
