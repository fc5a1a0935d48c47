"""Tars of others: what webdataset reads is what we read, and what lies about itself is refused in one line."""

import io
import json
import os
import tarfile

import pytest

import needs
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl import tars
from kvae_comfyui.training.vfl.tars import entries, samples, split_name

wds = needs.package("webdataset", "requirements-vfl.txt")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
JSON = b'{"identity": "a"}'


def written(path, files, form=tarfile.USTAR_FORMAT, **info):
    """A tar with these files, as (name, data)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in info.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key, suffix="png", data=b"picture", about=JSON):
    return [(f"{key}.{suffix}", data), (f"{key}.json", about)]


FILES = [
    *sample("a"), *sample("b", "JPG"), *sample("some.dots/c", "webp", b"x" * 1537), *sample("d" * 150, "jpeg"),
    ("d" * 150 + ".txt", b"a caption"), *sample("é", "png", b""), ("e.json", b'{"identity": 3}'),
    ("e.seg.png", b"mask"), ("e.png", b"e" * 512), ("__key__/x.png", b"meta"), ("noname", b"?"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_we_read_what_webdataset_reads(tmp_path, form):
    """Long names and fractions of seconds give headers of more than a block."""
    path = written(tmp_path / "a.tar", FILES, FORMATS[form], mtime=1.5)
    theirs = {}
    for each in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):
        picture = [each[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in each]
        if picture:
            theirs[each["__key__"]] = (picture[0], json.loads(each["json"]))
    data = path.read_bytes()
    found = list(entries(path))
    assert {e.id: (data[e.offset : e.offset + e.size], e.about) for e in found} == theirs
    assert len(found) == 6
    for each in found:
        head = tarfile.TarFile(fileobj=io.BytesIO(data[each.header : each.offset])).firstmember
        assert split_name(head.name)[0] == each.id


class Pipe:
    """A source that cannot seek, and gives a little at a time."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def read(self, size):
        return self.file.read(min(size, 100))


def test_a_pipe_gives_what_a_file_gives(tmp_path):
    path = written(tmp_path / "a.tar", FILES, tarfile.PAX_FORMAT)
    data = path.read_bytes()
    piped = list(samples(Pipe(data), with_pictures=True))
    assert [e.data for e in piped] == [data[e.offset : e.offset + e.size] for e in entries(path)]
    assert [e.id for e in piped] == [e.id for e in entries(path)]


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        list(entries(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", FORMATS)
def test_every_cut_is_noticed(tmp_path, form):
    """Also one between two files, and one within a header, which Python's tarfile takes for the end."""
    files = [*sample("a", data=b"x" * 700), *sample("b"), *sample("c", data=b"y" * 512)]
    whole = written(tmp_path / "whole.tar", files, FORMATS[form], mtime=1.5).read_bytes()
    end = whole.rstrip(b"\0")
    assert len(list(entries(tmp_path / "whole.tar"))) == 3
    cut = tmp_path / "cut.tar"
    for size in range(0, len(end), 128):
        cut.write_bytes(whole[:size])
        refused(cut)


def test_a_damaged_header_is_not_the_end(tmp_path):
    data = bytearray(written(tmp_path / "a.tar", [*sample("a"), *sample("b")]).read_bytes())
    data[2048 + 150] ^= 1  # in the checksum of the header of b
    (tmp_path / "a.tar").write_bytes(data)
    assert "damaged" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a.png", b"")], "the sample 'a' has no a.json next to its picture"),
        ([("a.json", JSON)], "the sample 'a' has 0 pictures; expected one"),
        ([*sample("a"), ("a.jpg", b"")], "the sample 'a' has 2 pictures"),
        ([("a.png", b""), *sample("b"), ("a.json", JSON)], "the sample 'a' has no a.json next to"),
        (sample("a", about=b"[1]"), "a.json: a JSON list; expected an object"),
        (sample("a", about=b"{"), "a.json: Expecting property name"),
        (sample("a", about=b"\xff\xfe{"), "a.json: "),
        (sample("a", about=b" " * (tars.MOST_JSON_BYTES + 1)), "a.json has 1,048,577 bytes; expected 1,048,576"),
    ],
)
def test_an_incomplete_sample_is_named(tmp_path, files, words):
    assert words in refused(written(tmp_path / "a.tar", files))


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with a right checksum, whatever it says."""
    block = bytearray(
        name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.rjust(12, b"\0") + b"0" * 11 + b"\0"
    )
    block = (block + b" " * 8 + kind).ljust(257, b"\0") + b"ustar\x0000"
    block = bytearray(block.ljust(512, b"\0"))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        header(b"a.png", b"77777777777\0"),  # 8 GiB
        header(b"a.png", b"\x80" + b"\x7f" * 11),  # 2⁹⁰ bytes
        header(b"a.png", b"\xff" * 8 + b"\xff\xff\xfa\x00"),  # negative: back to the start, for ever
        header(b"x", b"\xff" * 8 + b"\xff\xff\xfa\x00", b"x"),
        header(b"x", b"17777777777\0", b"x"),  # a header of 2 GiB
        header(b"x", b"17777777777\0", b"L"),
        header(b"a.png", b"00000000001\0", b"S"),  # stored with holes
        b"\x1f\x8b\x08" + bytes(600),  # gzip
        b"GIF89a" * 200,
        b"",
    ],
)
def test_a_header_that_lies_is_refused_at_once(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data + bytes(4096) if data else data)
    refused(tmp_path / "a.tar")


@needs.posix
@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
def test_a_header_of_gigabytes_is_not_read_into_memory(tmp_path, kind):
    """A hole in a file costs its author nothing."""
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"x", b"17777777777\0", kind))
    os.truncate(path, 3 << 30)
    assert "a header of 2,147,48" in refused(path)


def test_links_and_devices_are_passed_over(tmp_path):
    path = written(tmp_path / "a.tar", sample("a"))
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("b.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert [each.id for each in entries(path)] == ["a"]


def test_an_empty_tar_has_no_samples(tmp_path):
    assert list(entries(written(tmp_path / "a.tar", []))) == []


@needs.posix
def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(Exception, match="this is a pipe"):
        list(entries(tmp_path / "a.tar"))
