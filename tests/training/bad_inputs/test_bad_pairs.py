"""Malformed or damaged pairs, manifests and shards are refused in one line, and no file is left."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import needs
from bad_rows import (
    EVALUATE,
    MINE,
    NESTED,
    ON_PAIRS,
    PACK,
    PIXELS,
    SOURCE,
    TRAIN,
    UNPACK,
    Plant,
    Row,
    check,
    container,
    first_pair,
    latents,
    make_job,
    packed,
    pair_of,
)
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.data.pairs import Pair
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.evaluate.originals import original_frames

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)


def sourced(**changes: object) -> Plant:
    """A first pair whose name is not that of a video, so that its video is found only by its source."""
    return first_pair(pair_of(latents(), asdict(SOURCE) | changes), "a")


def sourced_outside(video: str) -> Plant:
    """The source names a good video outside --videos-root."""

    def plant(d: Path, job: Path) -> None:
        sourced(video=video.format(d=d))(d, job)
        (d / "videos").mkdir()
        shutil.copyfile(job / "videos" / SOURCE.video, d / "outside.mp4")

    return plant


NO_PAIRS = {
    "empty": b"",
    "half": pair_of(latents())[:-900],
    "not zstd": save(latents()),
    "no safetensors": packed(b"nothing of the kind"),
    "a header without end": packed(container(b"{")),
    "a nested header": packed(container(NESTED.encode())),
    "a header of 2^63 bytes": packed((2**63).to_bytes(8, "little") + b"{}"),
    "no z_k": pair_of({"z_h": latents()["z_h"]}),
    "another grid": pair_of(latents() | {"z_k": torch.zeros(16, 3, 6, 9).half()}),
    "no axes": pair_of(latents(shape=(16,))),
    "of nothing": pair_of(latents(shape=(16, 0, 6, 8))),
    "NaN": pair_of(latents(fill=math.nan)),
    "inf": pair_of(latents(fill=math.inf)),
    "beyond float16": pair_of(latents(torch.float32, fill=1e30)),
    "whole numbers": pair_of(latents(torch.int64)),
    "complex": pair_of(latents(torch.complex64)),
    "other channels": pair_of(latents(shape=(8, 3, 6, 8))),
}
ABSURD: list[dict[str, object]] = [
    *({"frames": 10**9}, {"frames": -1}, {"frames": 0}, {"first": -1}, {"first": 10**30}, {"height": 2**40}),
    *({"height": 0}, {"width": -48}, {"height": 49}, {"width": 10**30}, {"frames": 10**30}),
]
SOURCES = [NESTED, "{", "null", "[]", "3", '"text"', '{"video": "a.mp4"}', {**asdict(SOURCE), "frames": "nine"}]
PAIRS = [
    *(Row(command, "", first_pair(content), code=(0, 2) if "channels" in kind and "pack" in command else 2)
      for command in ON_PAIRS for kind, content in NO_PAIRS.items()),
    *(Row(command, "pipe", first_pair()) for command in ON_PAIRS),
    *(Row(PACK + MINE, "", first_pair(pair_of(latents(), source)), code=(0, 2)) for source in SOURCES),
    *(Row(PIXELS + MINE, "no such file", first_pair(pair_of(latents(), source), "a")) for source in SOURCES),
    Row(PACK + MINE, "", sourced(future=3), code=0),
    # what evaluate opens, and how much of it
    *(Row(PIXELS + MINE + " --videos-root {d}/videos", "", sourced_outside(video))
      for video in ("{d}/outside.mp4", "../outside.mp4", "a/../../outside.mp4", "C:\\v.mp4", "//host/v.mp4")),
    *(Row(PIXELS + MINE, "", sourced(video=video)) for video in ("absent.mp4", "", "n" * 300, "a\0b", ".", "a\nb.mp4")),
    *(Row(PIXELS + MINE, "", sourced(**change)) for change in ABSURD),
    Row(PIXELS + MINE, "", sourced(first=10**9)),
]  # fmt: skip


@pytest.mark.parametrize("row", PAIRS, ids=Row.name)
def test_a_malformed_pair_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


@pytest.mark.parametrize("change", ABSURD)
def test_a_pair_reads_no_more_of_its_video_than_its_latents_cover(change, job):
    with pytest.raises((UserError, ValueError), match="do not fit its latents|expected"):
        pair = Pair(**latents(), source=replace(SOURCE, **change))
        original_frames("a", pair, str(job / "videos"))


def changed(path: Path, change: Callable[[dict], object] | bytes | None) -> None:
    """Change the JSON of a file, replace its content by bytes, or replace the file by a named pipe (None)."""
    content = json.dumps(change(json.loads(path.read_text()))).encode() if callable(change) else change
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)


def manifest(change: Callable[[dict], object] | bytes | None) -> Plant:
    """Change or replace the manifest of the pairs, as `changed` does."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "latents", d / "latents")
        path = d / "latents" / "manifest.json"
        changed(path, change)

    return plant


NO_MANIFESTS: list[Callable[[dict], object] | bytes | None] = [
    *(b"", b"{", NESTED.encode(), b"null", b"[]", b"3", b"{}", b"\xff\xfe", None),
    *(lambda m: m | {"kvae": 3}, lambda m: m | {"kvae": None}, lambda m: m | {"kvae": {"space": []}}),
    *(lambda m: m | {"kvae": {"space": "sdxl", "sha256": "0"}}, lambda m: {"settings": {}}),
]
MANIFESTS = [
    *(Row(command, "manifest", manifest(change)) for command in ON_PAIRS[:2] for change in NO_MANIFESTS),
    *(Row(ON_PAIRS[2], "", manifest(change), code=(0, 2)) for change in NO_MANIFESTS),
    Row(PIXELS + MINE, "", manifest(lambda m: m | {"kvae": {"space": "kvae_3d_1.0"}})),
    Row(TRAIN + MINE, "channels", manifest(lambda m: m | {"kvae": m["kvae"] | {"space": "kvae_3d_2.0_t4s16"}})),
    Row(TRAIN + " --val-latent-root {d}/latents", "", manifest(lambda m: m | {"kvae": m["kvae"] | {"space": "x"}})),
    Row(TRAIN + " --val-latent-root {d}/latents", "", first_pair(NO_PAIRS["other channels"])),
]


def index(change: Callable[[dict], object] | bytes | None, file: str = "index.json") -> Plant:
    """Change or replace the index of the shards, as `changed` does."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "shards", d / "latents")
        path = d / "latents" / file
        changed(path, change)

    return plant


def shards_with(**change: object) -> Callable[[dict], object]:
    return lambda i: i | {"shards": [shard | change for shard in i["shards"]]}


def clips(change: Callable[[list], object] | bytes) -> Plant:
    """Change or replace the list of clips in a shard."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "shards", d / "latents")
        path = d / "latents" / "00000.safetensors"
        tensors, metadata = load_file(path), Weights(path).metadata
        old = json.loads(tensors["clips"].numpy().tobytes())
        content = json.dumps(change(old)).encode() if callable(change) else change
        tensors["clips"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        save_file(tensors, path, metadata)

    return plant


def renamed(name: str) -> Plant:
    return clips(lambda entries: [entries[0] | {"clip": name}, *entries[1:]])


NO_INDICES: list[Callable[[dict], object] | bytes | None] = [
    *(b"", b"{", NESTED.encode(), b"null", b"[]", b"{}", b"\xff", None),
    *(shards_with(pairs=n) for n in (-3, 10**30, "8", None, 7, 9)),
    *(shards_with(file=name) for name in ("../x.safetensors", "/etc/passwd", "", 3, "absent.safetensors")),
    *(shards_with(z_h=shape) for shape in ([], [16, 3], None, [16, 3, 6, -8], "abcd", [16, 3, 6, 10**30])),
    *(lambda i: i | {"shards": None}, lambda i: i | {"shards": {}}, lambda i: i | {"shards": [3]}),
    *(lambda i: i | {"format": "kvae-latent-shards/9"}, lambda i: i | {"shards": []}),
]
NO_CLIPS: list[Callable[[list], object] | bytes] = [
    *(b"{", NESTED.encode(), b"null", b"3", b"{}", b"[]", b"\xff", lambda entries: entries[:3]),
    *(lambda entries: [entries[0], *entries[:-1]], lambda entries: [entry["clip"] for entry in entries]),
    *(lambda entries: [{"clip": 3, "source": None}, *entries[1:]], lambda entries: [*entries, entries[0]]),
]
SHARDS = [
    *(Row(command + MINE, "", index(change)) for command in (UNPACK, EVALUATE) for change in NO_INDICES),
    *(Row(UNPACK + MINE, "", index(content, "00000.safetensors"))
      for content in (None, b"", b"x" * 200, container(NESTED.encode()))),
    Row(TRAIN + MINE, "", index(None, "00000.safetensors")),
    *(Row(UNPACK + MINE, "", clips(change), leaves=("u",)) for change in NO_CLIPS),
    *(Row(UNPACK + MINE, "", renamed(name), leaves=("u",))
      for name in ("../x", "/abs", "a/../../x", "n" * 300, "a\0b", ".", "..", "")),
    *(Row(UNPACK + MINE, "", renamed(name), code=(0, 2), leaves=("u",)) for name in ("..\\..\\x", "C:\\x", "a/")),
]  # fmt: skip


@pytest.mark.parametrize("row", MANIFESTS, ids=Row.name)
def test_a_malformed_manifest_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


@pytest.mark.parametrize("row", SHARDS, ids=Row.name)
def test_a_malformed_shard_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
