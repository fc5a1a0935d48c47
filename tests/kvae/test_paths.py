"""Files are written completely or not at all, and only regular files are opened."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import needs
from conftest import ROOT
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.kvae.files import Weights, save_weights
from kvae_comfyui.kvae.paths import (
    check_regular,
    read_bytes,
    read_text,
    sha256_of,
    write_bytes,
    write_text,
    written_whole,
)

WRITER = """
import sys, time
from kvae_comfyui.kvae.paths import write_bytes, written_whole
with written_whole(sys.argv[1]) as partial:
    partial.write_bytes(b"half")
    print("open", flush=True)
    time.sleep(60)
"""


def python(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), written_whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(path.parent) == ["a.txt"]


@needs.posix
def test_files_of_killed_writers_are_deleted_by_the_next_process_and_those_of_living_writers_are_not(tmp_path):
    killed, living = (python(WRITER, tmp_path / name) for name in ("killed", "living"))
    try:
        assert killed.stdout.readline() == living.stdout.readline() == "open\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(names(tmp_path)) == 2  # both hidden, so nobody takes them for results
        assert all(name.startswith(".") for name in names(tmp_path))
        write = "import sys; from kvae_comfyui.kvae.paths import write_bytes; write_bytes(sys.argv[1], b'done')"
        assert python(write, tmp_path / "next").wait() == 0
        assert len(names(tmp_path)) == 2 and "next" in names(tmp_path)
        assert living.poll() is None
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()


@needs.posix
def test_writers_of_one_path_do_not_interfere(tmp_path):
    """Readers see the complete file of one writer."""
    path, size = tmp_path / "shared", 200_000
    code = "import sys; from kvae_comfyui.kvae.paths import write_bytes\n"
    code += "for _ in range(150): write_bytes(sys.argv[1], sys.argv[2].encode() * int(sys.argv[3]))"
    writers = [python(code, path, letter, size) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            data = path.read_bytes()
            seen.add((len(data), len(set(data))))
    assert [writer.communicate() and writer.returncode for writer in writers] == [0, 0, 0]
    assert seen == {(size, 1)} and names(tmp_path) == ["shared"]


@needs.posix
def test_a_complete_file_is_not_swept_before_it_has_its_name(tmp_path, monkeypatch):
    rename = os.replace

    def replace(source, target):
        write = "import sys; from kvae_comfyui.kvae.paths import write_bytes; write_bytes(sys.argv[1], b'')"
        assert python(write, tmp_path / "other").wait() == 0  # a new process, which sweeps the folder
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_bytes(tmp_path / "mine", b"done")
    assert (tmp_path / "mine").read_bytes() == b"done" and names(tmp_path) == ["mine", "other"]


def test_threads_can_write_into_one_folder(tmp_path):
    threads = [threading.Thread(target=write_text, args=(tmp_path / f"{i % 5}", "x")) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == list("01234")


def test_a_weights_file_has_the_bytes_that_safetensors_writes(tmp_path):
    tensors = {"b": torch.randn(3, 5).T, "a": torch.randn(()), "empty": torch.empty(0, 4)}
    save_weights(tmp_path / "a", tensors, {"key": "täxt"})
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    assert (tmp_path / "a").read_bytes() == save(whole, {"key": "täxt"})


def test_every_dtype_is_read_back_bit_for_bit(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(kind): (10 * torch.randn(7, 3)).to(kind) for kind in kinds}
    save_weights(tmp_path / "a", tensors, {})
    found = load_file(tmp_path / "a")
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8))


def test_an_unsupported_dtype_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(WeightsError, match="could not be written"):
        save_weights(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/below", "something else has that name"),
        ("folder", "this is a folder"),
        ("n" * 300, "shorter name"),
        ("a\0b", "not a name"),
        ("loop/a", "something else has that name"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_of_one_line(tmp_path, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = names(tmp_path)
    with pytest.raises(WeightsError, match=words) as error:
        write_bytes(tmp_path / name, b"")
    assert "\n" not in str(error.value) and names(tmp_path) == before


@needs.posix
def test_pipes_devices_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        for read in (check_regular, read_bytes, sha256_of, Weights):
            with pytest.raises(WeightsError, match=words):
                read(path)
    with pytest.raises(WeightsError, match="no such file"):
        read_bytes(tmp_path / "absent")


@needs.posix
def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="a pipe"):
        write_text(tmp_path / "pipe", "text")
    assert names(tmp_path) == ["pipe"] and not (tmp_path / "pipe").is_file()


def test_a_file_that_is_too_large_or_not_text_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff" * 11)
    with pytest.raises(WeightsError, match="that large"):
        read_bytes(tmp_path / "a", 10)
    with pytest.raises(WeightsError, match="not UTF-8"):
        read_text(tmp_path / "a")


def test_a_name_in_another_encoding_can_be_written_as_json(tmp_path):
    write_text(tmp_path / "a.json", '{"video": "caf\udce9.mp4"}')
    assert (tmp_path / "a.json").read_text() == '{"video": "caf\\udce9.mp4"}'
