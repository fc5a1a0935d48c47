"""Every identity equally often, whatever its number of pictures, by both readers, in two processes of four workers."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import needs
from conftest import ROOT
from kvae_comfyui.training.vfl import pack as packing
from kvae_comfyui.training.vfl.index import Index
from vfl_pictures import COUNTS, make_folder, named, pack

needs.package("webdataset", "requirements-vfl.txt")
DRAWS, PROCESSES, WORKERS = 20_000, 2, 4
PICTURES = sum(COUNTS)


@pytest.fixture(scope="module")
def balance(tmp_path_factory):
    """310 pictures of five identities in several shards, train only."""
    root = tmp_path_factory.mktemp("balance")
    make_folder(root / "in", named(COUNTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARD_BYTES", 5000)
        assert pack(root / "in", root / "set", "--val-share", "0") == 0
    return root / "set"


def drawn(kind: str, root: Path, count: int = DRAWS, processes: int = PROCESSES, workers: int = WORKERS):
    """What each process drew: rows of worker, id, identity, and whether there was a secondary."""
    argv = [str(Path(__file__).with_name("draw_samples.py")), kind, str(root), str(count // processes), str(workers)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    how = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen([sys.executable, *argv], env=env | {"RANK": str(rank)}, **how) for rank in range(processes)
    ]
    out = [process.communicate(timeout=300) for process in started]
    assert not any(process.returncode for process in started), out
    return [[json.loads(line) for line in text.splitlines()] for text, _ in out]


@pytest.fixture(scope="module", params=["index", "stream"])
def rows(request, balance):
    """It lasts 10 s on two busy cores: the streams read 130,000 pictures for their 20,000."""
    return request.param, drawn(request.param, balance)


def test_every_identity_comes_equally_often(rows):
    _, found = rows
    counts = Counter(identity for process in found for _, _, identity, _ in process)
    assert sum(counts.values()) == DRAWS and counts.keys() == set(range(len(COUNTS)))
    for count in counts.values():
        assert abs(count / DRAWS - 0.2) < 0.01
    for process in found:  # and in each process alone, within four deviations
        assert len({worker for worker, *_ in process}) == WORKERS
        for count in Counter(identity for _, _, identity, _ in process).values():
            assert abs(count / len(process) - 0.2) < 4 * (0.16 / len(process)) ** 0.5


def test_every_picture_of_an_identity_comes_equally_often(rows):
    """The specification's fault, a generator made anew for each sample, shows only the rarest identity."""
    _, found = rows
    ids = {(identity, key): 0 for process in found for _, key, identity, _ in process}
    for process in found:
        for _, key, identity, _ in process:
            ids[identity, key] += 1
    assert len(ids) == PICTURES
    for identity, count in enumerate(COUNTS):
        times = np.array([n for (i, _), n in ids.items() if i == identity])
        expected = DRAWS / len(COUNTS) / count
        # chi-square within five deviations; a stream shows its pictures more evenly than chance
        assert ((times - expected) ** 2 / expected).sum() < count + 5 * (2 * count) ** 0.5


def test_no_two_workers_are_alike(rows):
    _, found = rows
    lists = [[key for w, key, *_ in process if w == worker] for process in found for worker in range(WORKERS)]
    assert len(lists) == PROCESSES * WORKERS and min(map(len, lists)) > 1000
    for i, one in enumerate(lists):
        for other in lists[:i]:
            same = sum(a == b for a, b in zip(one, other, strict=False)) / min(len(one), len(other))
            assert same < 0.05  # by chance, Σ 0.2² / count = 0.8 %


def test_a_secondary_comes_as_often_as_asked(rows):
    """Of the stream, whose workers hold the last picture of every identity, a little less: it may be the same one."""
    kind, found = rows
    share = sum(bool(other) for process in found for *_, other in process) / DRAWS
    assert abs(share - 0.1) < 4 * (0.09 / DRAWS) ** 0.5 + (0.002 if kind == "stream" else 0)


def test_workers_that_read_one_shard_accept_other_pictures_of_it(tmp_path):
    """Each draws by its own numbers: with the same ones, all would accept the same pictures in the same order."""
    make_folder(tmp_path / "in", named((2, 60)))
    assert pack(tmp_path / "in", tmp_path / "set", "--val-share", "0") == 0
    found = drawn("stream", tmp_path / "set", 160)
    lists = [[key for w, key, *_ in process if w == worker] for process in found for worker in range(WORKERS)]
    assert len({tuple(sorted(each)) for each in lists}) == PROCESSES * WORKERS


def test_the_index_gives_any_number_of_processes_the_same_run(rows, balance):
    """Here one process without workers; and a run that is resumed in the middle goes on as it would have."""
    kind, found = rows
    if kind == "index":
        index = Index(balance, "train")
        together = [row[1:3] for pair in zip(*found, strict=True) for row in pair]
        for k in (*range(300), *range(9000, 9100)):
            sample = index.sample(42, k, 0.1, len)
            assert [sample.id, sample.identity] == together[k]


def test_a_stream_repeats_itself(rows, balance):
    kind, found = rows
    if kind == "stream":
        again = drawn(kind, balance, 200)
        assert again == [process[: len(part)] for process, part in zip(found, again, strict=True)]
