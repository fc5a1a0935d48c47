"""The reader of streams: over HTTP, with shards that fail, identities that are unknown, and secondaries."""

import shutil
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
from test_tars import sample, written

import needs
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl import pack as packing
from kvae_comfyui.training.vfl.pictures import PictureError
from kvae_comfyui.training.vfl.shards import Manifest, manifest_path, read_manifest, shard_files
from vfl_pictures import make_folder, pack

needs.package("webdataset", "requirements-vfl.txt")
from webdataset.gopen import gopen  # noqa: E402

from kvae_comfyui.training.vfl import stream as streams  # noqa: E402
from kvae_comfyui.training.vfl.stream import Stream, shard_urls, streamed  # noqa: E402

curl = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl: webdataset reads from the web by it")
COUNTS = {"ash": 24, "brock": 6, "solo": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """31 pictures in several shards, train only."""
    root = tmp_path_factory.mktemp("stream")
    make_folder(root / "in", COUNTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARD_BYTES", 1200)
        assert pack(root / "in", root / "set", "--val-share", "0") == 0
    return root / "set"


def stream(data, urls=None, read=bytes, **options):
    urls = urls or [path.as_uri() for path in shard_files(data, "train")]
    return Stream(urls, read_manifest(manifest_path(data, "train")), 0, read=read, **options)


def taken(reader, count, workers=0):
    return list(islice(streamed(reader, workers), count))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(data):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(data)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@curl
def test_shards_are_read_from_the_web(data, address):
    last = len(shard_files(data, "train")) - 1
    urls = shard_urls(f"{address}/data/train/train-{{000000..{last:06d}}}.tar")
    local = [(each.id, each.picture, each.identity) for each in taken(stream(data, shuffled=4), 10)]
    assert [(each.id, each.picture, each.identity) for each in taken(stream(data, urls, shuffled=4), 10)] == local
    known = {path.read_bytes(): path.parent.name for path in (data.parent / "in").rglob("*.png")}
    assert all(known[picture] == sorted(COUNTS)[identity] for _, picture, identity in local)


def test_another_epoch_is_another_sequence(data):
    ids = [[each.id for each in taken(stream(data, epoch=epoch), 50)] for epoch in (0, 1, 0)]
    assert ids[0] == ids[2] != ids[1]


def test_a_secondary_is_the_picture_that_was_accepted_before(data):
    """Before they are mixed: here the buffer mixes nothing."""
    latest = {}
    seen = Counter()
    for each in taken(stream(data, p_secondary=1.0, shuffled=1), 600):
        before = latest.get(each.identity)
        assert each.secondary == (before if before != each.picture else None)
        seen[each.identity, each.secondary is not None] += 1
        latest[each.identity] = each.picture
    assert seen[0, True] > 150 and seen[1, True] > 100 and not seen[2, True]


def test_only_so_many_secondaries_are_held(data):
    """With room for one identity, the last one: a secondary comes only after a picture of the same identity."""
    before = None
    found = 0
    for each in taken(stream(data, p_secondary=1.0, shuffled=1, secondaries=1), 400):
        held = before if before and before.identity == each.identity and before.id != each.id else None
        assert each.secondary == (held.picture if held else None)
        found += held is not None
        before = each
    assert found > 20


def test_a_picture_that_is_accepted_again_refreshes_what_is_held(tmp_path):
    """Room for two identities. After a, b, a, c it holds a and c: so a has a secondary, and b has none."""
    abouts = {f"{who}{i}": b'{"identity": "%c"}' % ord(who) for i, who in enumerate("abacab")}
    files = [each for key, about in abouts.items() for each in sample(key, about=about)]
    reader = Stream(
        [written(tmp_path / "a.tar", files).as_uri()], Manifest("identity", dict.fromkeys("abc", 2)), 0,
        p_secondary=1.0, read=lambda data: "", secondaries=2, shuffled=1,
    )  # fmt: skip
    found = [(each.id, each.secondary is not None) for each in taken(reader, 6)]
    assert found == [("a0", False), ("b1", False), ("a2", True), ("c3", False), ("a4", True), ("b5", False)]


def test_processes_and_workers_share_out_one_sequence_of_shards(data, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(streams, "gopen", lambda url: opened.append(url) or gopen(url))

    def shards(**place: int) -> list[str]:
        for name, value in place.items():  # as torchrun and webdataset name them
            monkeypatch.setenv(name, str(value))
        opened.clear()
        taken(stream(data, shuffled=1), 60)
        return opened[:16]

    whole = shards(RANK=0, WORLD_SIZE=1, WORKER=0, NUM_WORKERS=1)
    parts = [shards(RANK=r, WORLD_SIZE=2, WORKER=w, NUM_WORKERS=2) for r in range(2) for w in range(2)]
    assert len(set(whole)) == len(shard_files(data, "train"))
    assert [part[:4] for part in parts] == [whole[first::4] for first in (0, 2, 1, 3)]


def test_a_shard_that_fails_is_named_and_the_others_are_read(data, tmp_path):
    paths = shard_files(data, "train")
    (tmp_path / "cut.tar").write_bytes(paths[0].read_bytes()[:5000])
    urls = [*(path.as_uri() for path in paths[1:]), (tmp_path / "cut.tar").as_uri(), (tmp_path / "none.tar").as_uri()]
    found = taken(stream(data, urls), 300)
    reasons = {text for each in found for text in each.skipped}
    assert len(reasons) == 2 and any(text.endswith("none.tar: No such file or directory") for text in reasons)
    assert any("cut.tar: damaged, cut short, or not a tar" in text for text in reasons)
    assert len({each.id for each in found}) > 20


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_failures_end_the_stream_in_one_line(data, tmp_path, workers):
    written(tmp_path / "empty.tar", [])
    written(tmp_path / "text.tar", [("a.png", b"")])
    for name, why in (
        ("none.tar", "No such file or directory"),
        ("empty.tar", "it holds no picture"),
        ("text.tar", "the sample 'a' has no a.json next to its picture"),
    ):
        with pytest.raises(UserError) as error:
            taken(stream(data, [(tmp_path / name).as_uri()]), 1, workers)
        assert str(error.value).startswith("5 shards in a row gave no picture; the last: file://")
        assert str(error.value).endswith(f"{name}: {why}")


@curl
def test_a_failed_transfer_does_not_show_its_command(data, address):
    """webdataset's message would: it may hold a token."""
    with pytest.raises(UserError) as error:
        taken(stream(data, [f"{address}/absent.tar"]), 1)
    assert "curl" not in str(error.value) and f"{address}/absent.tar: " in str(error.value)


def test_an_identity_that_the_manifest_lacks_is_an_error(data, tmp_path):
    path = written(tmp_path / "a.tar", sample("x", about=b'{"identity": "Misty"}'))
    with pytest.raises(UserError, match="a.tar: x is of 'misty', which the manifest lacks"):
        taken(stream(data, [path.as_uri()]), 1)
    reader = Stream([path.as_uri()], Manifest("name", {"misty": 1}), 0)
    with pytest.raises(UserError, match="a.tar: x.json: no identity under 'name'"):
        taken(reader, 1)


def test_a_picture_that_cannot_be_read_is_left_out(data):
    bad = {path.read_bytes() for path in sorted((data.parent / "in/ash").iterdir())[:12]}

    def read(file: bytes) -> bytes:
        if file in bad:
            raise PictureError("broken")
        return file

    found = taken(stream(data, read=read, p_secondary=1.0), 300)
    assert not {each.picture for each in found} & bad and not {each.secondary for each in found} & bad
    assert len({text for each in found for text in each.skipped}) == 12

    def none(file: bytes) -> bytes:
        raise PictureError("broken")

    with pytest.raises(UserError, match="100 pictures in a row cannot be read; the last: [0-9a-f]{16}: broken"):
        taken(stream(data, read=none), 1)


def test_an_address_may_name_many_shards_and_no_command():
    assert shard_urls("https://host/t-{08..11}.tar::hf://datasets/a/b/c.tar") == [
        *(f"https://host/t-{i:02d}.tar" for i in range(8, 12)),
        "hf://datasets/a/b/c.tar",
    ]
    for text in ("pipe:touch /tmp/x", "ssh://host/a.tar", "", "https://host/a.tar::"):
        with pytest.raises(UserError, match="is no shard; expected a path, or an address that starts with file, http"):
            shard_urls(text)
