"""Bad input of every kind, a row each: the command ends soon, in one line that says what is wrong, and leaves nothing.

To add one: `Row(command, words of the line, what to plant first)`. In a command, {d} is a folder of its own, {job} the
folder of good things that all rows share, {h2k} and {k2h} its adapters; `plant` gets both folders. A row whose code
is (0, 2) may also work: then nothing is asked but that it ends.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save, save_file

from conftest import make_videos
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.manifests import read_spaces
from kvae_comfyui.training.data.pairs import SUFFIX, Pair, Source, write_pair
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.evaluate.originals import original_frames
from kvae_comfyui.training.runtime.checkpoint import open_state
from kvae_comfyui.training.runtime.interrupts import BetweenSteps
from kvae_comfyui.training.runtime.log import read_log
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS, load_hunyuan_vae, load_kvae_for_training

SECONDS = 60  # what hangs is broken off then
SHAPE = (16, 3, 6, 8)
SOURCE = Source("v_Wave_g01_c01.mp4", 0, 9, 0, 48, 64)
pytestmark = pytest.mark.skipif(os.name == "nt", reason="plants pipes and links, as POSIX has them")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """Videos, a pair of each, the same in a shard, and both embedded adapters."""
    folder = tmp_path_factory.mktemp("job")
    make_videos(folder / "videos", 8, frames=9)
    generator = torch.Generator().manual_seed(0)
    for i in range(1, 9):
        source = replace(SOURCE, video=f"v_Wave_g{i:02d}_c01.mp4")
        pair = Pair(*(torch.randn(SHAPE, generator=generator).half() for _ in "hk"), source)
        write_pair(folder / "latents" / (source.video.removesuffix(".mp4") + SUFFIX), pair)
    vaes = {"hunyuan_vae": load_hunyuan_vae("tiny", "cpu"), "kvae": load_kvae_for_training("tiny", "cpu")}
    manifest = {"command": "extract", "settings": {}}
    manifest |= {key: {"space": vae.space.name, "sha256": vae.digest} for key, vae in vaes.items()}
    (folder / "latents" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["pack", "--latent-root", f"{folder}/latents", "--output-root", f"{folder}/shards"]) == 0
    for way, path in TINY_ADAPTERS.items():
        shutil.copyfile(path, folder / f"{way}.safetensors")
    return folder


Plant = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Row:
    command: str
    words: str = ""
    plant: Plant | None = None
    code: int | tuple[int, ...] = 2
    leaves: tuple[str, ...] = ()  # what a refusal may leave, by the first part of its path


@contextmanager
def broken_off(seconds: int) -> Iterator[None]:
    """Whatever does not end raises."""

    def stop(*_):
        pytest.fail("it does not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files(folder: Path) -> dict[str, object]:
    """All there is in a folder: of files the content, of anything else its kind."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if plain else path.lstat().st_mode
    return found


def fill(command: str, d: Path, job: Path) -> list[str]:
    places = {"d": d, "job": job, "h2k": job / "h2k.safetensors", "k2h": job / "k2h.safetensors", "long": "n" * 300}
    return [word.format(**places, nul="\0", latin="caf\udce9") for word in shlex.split(command)]


def check(row: Row, d: Path, job: Path, capsys) -> None:
    if row.plant:
        row.plant(d, job)
    good, before = files(job), files(d)
    capsys.readouterr()
    with broken_off(SECONDS):
        code = main(fill(row.command, d, job))
    err = capsys.readouterr().err
    expected = row.code if isinstance(row.code, tuple) else (row.code,)
    assert code in expected, err
    assert files(job) == good
    if code != 2:
        return
    *skipped, last = err.splitlines()
    assert last.startswith("error: ") and all(line.startswith("skipped: ") for line in skipped), err
    assert row.words in last
    after = {name: kind for name, kind in files(d).items() if name.split("/")[0] not in row.leaves}
    assert after == {name: kind for name, kind in before.items() if name.split("/")[0] not in row.leaves}


CPU = " --device cpu"
EXTRACT = "extract --videos-root {job}/videos --output-root {d}/l --num-frames 9 --height 48 --width 64" + CPU
PACK = "pack --latent-root {job}/latents --output-root {d}/s"
UNPACK = "unpack --latent-root {job}/shards --output-root {d}/u"
OUT = " --out-h2k {d}/a/h.safetensors --out-k2h {d}/a/k.safetensors"
TRAIN = "train --latent-root {job}/latents --epochs 1" + OUT + CPU
ADAPTERS = " --adapter-h2k {h2k} --adapter-k2h {k2h}"
EVALUATE = "evaluate --latent-root {job}/latents --output-root {d}/e --num-pixel-samples 1" + ADAPTERS + CPU
PIXELS = EVALUATE + " --videos-root {job}/videos"
RECONSTRUCT = (
    "reconstruct --video-path {job}/videos/v_Wave_g01_c01.mp4 --output {d}/r.mp4 --num-frames 9 --height 48 --width 64"
    + CPU
)
TINY_COMMAND = "tiny --videos-root {job}/videos --output {d}/t.safetensors" + CPU
DEMO = "demo --videos {job}/videos --output-root {d}/demo" + CPU
FETCH = "fetch --model KVAE-3D-1.0 --output {d}/m"

# Outputs that cannot be written, of every command: known before any work.


def plant_places(d: Path, job: Path) -> None:
    (d / "file").write_text("a file")
    (d / "folder").mkdir()
    (d / "loop").symlink_to(d / "loop")
    os.mkfifo(d / "pipe")


FOLDERS = [
    *((EXTRACT, "--output-root"), (PACK, "--output-root"), (UNPACK, "--output-root"), (EVALUATE, "--output-root")),
    *((DEMO, "--output-root"), (FETCH, "--output")),
]
TARGETS = [(TRAIN, "--out-h2k"), (TRAIN, "--out-k2h"), (RECONSTRUCT, "--output"), (TINY_COMMAND, "--output")]
NO_PLACES = ["{d}/file/under", "/proc/x/y", "/sys/x/y", "{d}/{long}", "{d}/{long}/x", "{d}/loop/x", "{d}/a{nul}b", "''"]
NO_FOLDERS = [*NO_PLACES, "{d}/file", "{d}/pipe"]
NO_TARGETS = [*NO_PLACES, "{d}/folder", "{d}/pipe", "/dev/null"]
OUTPUTS = [
    Row(f"{command} {option} {place}", option, plant_places)
    for commands, places in ((FOLDERS, NO_FOLDERS), (TARGETS, NO_TARGETS))
    for command, option in commands
    for place in places
]

# Outputs that would overwrite each other, or what is read.


def plant_adapter_named_as_an_output(d: Path, job: Path) -> None:
    (d / "e").mkdir()
    shutil.copyfile(job / "h2k.safetensors", d / "e" / "evaluation.txt")


def plant_a_video(d: Path, job: Path) -> None:
    shutil.copyfile(job / "videos" / "v_Wave_g01_c01.mp4", d / "a.mp4")


def plant_pairs_of_ones_own(d: Path, job: Path) -> None:
    shutil.copytree(job / "latents", d / "demo" / "pairs" / "train")


OVERWRITING = [
    Row(DEMO, "that no demo has made", plant_pairs_of_ones_own),
    Row(TRAIN + " --out-k2h {d}/a/./h.safetensors", "overwrite"),
    Row(TRAIN + " --out-k2h {d}/a/../a/h.safetensors", "overwrite"),
    Row(TRAIN + " --out-h2k {d}/a/train.json"),
    Row(TRAIN + " --out-k2h {d}/a/train.jsonl"),
    Row(TRAIN + " --out-k2h {d}/a/report.html"),
    Row(TRAIN + " --out-k2h {d}/a/h.resume.safetensors"),
    Row(EVALUATE + " --adapter-h2k {d}/e/evaluation.txt", "overwrite", plant_adapter_named_as_an_output),
    Row(TINY_COMMAND + " --start-from {d}/t.safetensors", "overwrite"),
    Row(RECONSTRUCT + " --video-path {d}/a.mp4 --output {d}/./a.mp4", "overwrite", plant_a_video),
    Row(TINY_COMMAND + " --output {d}/t.jsonl", "expected a name that ends in .safetensors"),
]

# Options out of their range.

OPTIONS = [
    Row("frobnicate", "invalid choice"),
    Row("train", "required: --latent-root"),
    Row(TRAIN + " --no-such-option 3", "unrecognized arguments"),
    *(Row(f"{TRAIN} --lr {x}", "--lr is") for x in ("nan", "inf", "-1", "0")),
    Row(TRAIN + " --lr=-inf", "--lr is"),
    *(Row(f"{TRAIN} --weight-decay {x}", "--weight-decay is") for x in ("nan", "inf", "-1")),
    *(Row(f"{TRAIN} --ema {x}", "--ema is") for x in ("nan", "1", "-0.1", "inf")),
    *(Row(f"{TRAIN} --epochs {x}", "--epochs is") for x in ("0", "-1", str(2**80))),
    *(Row(f"{TRAIN} --batch-size {x}", "--batch-size is") for x in ("0", "-1", str(2**80))),
    *(Row(f"{TRAIN} --seed {x}", "--seed is") for x in ("-1", str(2**80))),
    Row(f"{TRAIN} --seed {'9' * 5000}", "no number that anything here takes"),
    *(Row(f"{TRAIN} --epochs {x}", "invalid int value") for x in ("1.5", "1e3", "''", "many")),
    Row(TRAIN + " --network other", "invalid choice"),
    Row("train --latent-root ''" + OUT + CPU, "--latent-root is empty"),
    *(Row(f"{command} --device {device}", "not to be had here") for command in (TRAIN, EXTRACT, EVALUATE, RECONSTRUCT)
      for device in ("meta", "moon", "cuda:99")),
    *(Row(f"{TRAIN} --device {device}", "not to be had here") for device in (
        *("xla", "mps", "hpu", "xpu", "mtia", "privateuseone", "vulkan", "ipu", "ve", "fpga", "maia", "lazy"),
        *("mkldnn", "opengl", "opencl", "ideep", "hip", "cpu:x", ":", "cuda:-1"),
    )),
    Row(TRAIN + " --device ''", "--device is empty"),
    *(Row(f"{EXTRACT} --height {x}", "--height is") for x in (str(2**40), str(2**20), "0", "-8", "50", "8")),
    *(Row(f"{EXTRACT} --width {x}", "--width is") for x in (str(2**40), "0")),
    *(Row(f"{EXTRACT} --num-frames {x}", "--num-frames is") for x in ("4", "0", "-3", str(2**40))),
    *(Row(f"{EXTRACT} --clips-per-video {x}", "--clips-per-video is") for x in ("0", "-1")),
    *(Row(f"{EXTRACT} --max-clips {x}", "--max-clips is") for x in ("-1", str(2**80))),
    *(Row(f"{EXTRACT} --batch-size {x}", "--batch-size is") for x in ("0", "-1")),
    *(Row(f"{EXTRACT} --seed {x}", "--seed is") for x in ("-1", str(2**80))),
    *(Row(f"{RECONSTRUCT} --height {x}", "") for x in ("0", "-8", "1048576", str(2**40), "50")),
    *(Row(f"{RECONSTRUCT} --num-frames {x}", "--num-frames is") for x in ("-3", "0", str(2**40))),
    Row(RECONSTRUCT + " --output {d}/r.avi", ".mp4"),
    *(Row(f"{PIXELS} --num-pixel-samples {x}", "--num-pixel-samples is") for x in ("0", "-1", str(2**80))),
    *(Row(f"{EVALUATE} --max-samples {x}", "--max-samples is") for x in ("0", "-1", str(2**80))),
    Row(EVALUATE + " --max-samples 1", "give --train-latent-root"),
    Row(EVALUATE + " --adapter-h2k ''", "--adapter-h2k is empty"),
    *(Row(f"{TINY_COMMAND} --stages {x}", "--stages") for x in (
        *("10x0x1", "1x32x999999999", "0x32x1", "1x32x0", "1x12x1", "1x256x1", "''", "1x32", "1x32x1q", "-1x32x1"),
        *("1x32x1,,1x32x1", "٣x32x1", f"{'9' * 5000}x32x1", f"1x32x{'9' * 5000}"),
    )),
    *(Row(f"{TINY_COMMAND} --threads {x}", "--threads is") for x in ("-1", "1000000000")),
    *(Row(f"{TINY_COMMAND} --lr {x}", "--lr is") for x in ("nan", "0", "inf", "-1")),
    *(Row(f"{TINY_COMMAND} --seed {x}", "--seed is") for x in ("-1", str(2**80))),
    *(Row(f"{DEMO} --epochs {x}", "--epochs is") for x in ("0", "-1")),
    *(Row(f"{DEMO} --clips-per-video {x}", "--clips-per-video is") for x in ("0", "-1")),
]  # fmt: skip

# What is read: folders and files that are none.


def plant_odd_folders(d: Path, job: Path) -> None:
    plant_places(d, job)
    for name in ("empty", "videos"):
        (d / name).mkdir()
    (d / "videos" / "a.mp4").write_text("no video")


FILES = ["{d}/absent", "{d}/pipe", "{d}/loop", "{d}/{long}", "{d}/a{nul}b", "{d}/{latin}", "{d}/file", "{d}/file/x"]
READING = [
    Row(f"{command} {option} {place}", "", plant_odd_folders)
    for command, option in (
        *((EXTRACT, "--videos-root"), (PACK, "--latent-root"), (UNPACK, "--latent-root"), (TRAIN, "--latent-root")),
        *((TRAIN, "--val-latent-root"), (EVALUATE, "--latent-root"), (EVALUATE, "--train-latent-root")),
        *((PIXELS, "--videos-root"), (EVALUATE, "--adapter-h2k"), (RECONSTRUCT, "--video-path")),
        *((RECONSTRUCT, "--kvae"), (EXTRACT, "--hunyuan-vae"), (TINY_COMMAND, "--videos-root"), (DEMO, "--videos")),
        *((TINY_COMMAND, "--start-from"), (PIXELS, "--kvae")),
    )
    for place in (*FILES, "{d}/empty")
]  # fmt: skip
READING += [
    Row(EXTRACT + " --videos-root {d}/videos", "none of the 1 videos", plant_odd_folders, leaves=()),
    *(Row(f"{EXTRACT} --kvae={x}", "") for x in ("-x/y", "a" * 60 + "/" + "b" * 60, "a/b/c", "a--b/c", "a/..", "x/")),
    *(Row(f"{FETCH} --model {x}", "--model") for x in (
        *("''", "a/b", "a/b/../../c.safetensors", "a/b//etc/x.safetensors", "a/b/c.pt", "a/b/./c.safetensors"),
        *("a" * 60 + "/" + "b" * 60 + "/c.safetensors", "a--b/c/d.safetensors", "a/b/c{nul}.safetensors"),
    )),
    Row(f"{FETCH} --model=-x/y/z.safetensors", "--model"),
    Row(TINY_COMMAND, "9 frames; expected at least 17"),
]  # fmt: skip

# Pairs of others. MINE is a copy of the good ones, of which the first is another.

MINE = " --latent-root {d}/latents"
ON_PAIRS = (TRAIN + MINE, EVALUATE + MINE, PACK + MINE)
NESTED = "[" * 100_000


def first_pair(content: bytes | None = None, name: str = "v_Wave_g01_c01") -> Plant:
    """The first pair's content is this (None: a pipe)."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "latents", d / "latents")
        (d / "latents" / ("v_Wave_g01_c01" + SUFFIX)).unlink()
        path = d / "latents" / (name + SUFFIX)
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)

    return plant


def container(header: bytes, data: bytes = b"") -> bytes:
    """Of safetensors."""
    return len(header).to_bytes(8, "little") + header + data


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def pair_of(tensors: dict[str, torch.Tensor], source: object = None) -> bytes:
    metadata = None if source is None else {"source": source if isinstance(source, str) else json.dumps(source)}
    return packed(save(tensors, metadata))


def latents(dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = SHAPE, fill: float | None = None) -> dict:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if fill is None else torch.full(shape, fill)
    return {"z_h": z.to(dtype), "z_k": z.flip(0).to(dtype).clone()}


def sourced(**changes: object) -> Plant:
    """A first pair of which no video has the name, so that none is found but by what it says."""
    return first_pair(pair_of(latents(), asdict(SOURCE) | changes), "a")


def sourced_outside(video: str) -> Plant:
    """There is a video, right in all, but not in --videos-root."""

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
    # what evaluate opens and how much of it
    *(Row(PIXELS + MINE + " --videos-root {d}/videos", "", sourced_outside(video))
      for video in ("{d}/outside.mp4", "../outside.mp4", "a/../../outside.mp4", "C:\\v.mp4", "//host/v.mp4")),
    *(Row(PIXELS + MINE, "", sourced(video=video)) for video in ("absent.mp4", "", "n" * 300, "a\0b", ".", "a\nb.mp4")),
    *(Row(PIXELS + MINE, "", sourced(**change)) for change in ABSURD),
    Row(PIXELS + MINE, "", sourced(first=10**9)),
]  # fmt: skip

# Manifests and shards of others.


def changed(path: Path, change: Callable[[dict], object] | bytes | None) -> None:
    """A file of JSON with another value in it, with other content, or as a named pipe (None)."""
    content = json.dumps(change(json.loads(path.read_text()))).encode() if callable(change) else change
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)


def manifest(change: Callable[[dict], object] | bytes | None) -> Plant:
    """The pairs' manifest is this (None: a pipe), or made into this."""

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
    """The same of the shards' index."""

    def plant(d: Path, job: Path) -> None:
        shutil.copytree(job / "shards", d / "latents")
        path = d / "latents" / file
        changed(path, change)

    return plant


def shards_with(**change: object) -> Callable[[dict], object]:
    return lambda i: i | {"shards": [shard | change for shard in i["shards"]]}


def clips(change: Callable[[list], object] | bytes) -> Plant:
    """What a shard says of its clips is this, or made into this."""

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

# Adapters and VAEs of others.


def weights_like(
    path: Path | None, name: str, change: Callable[[dict, dict], object], header: bytes | None = None
) -> Plant:
    """{d}/NAME: a good file, of which tensors and metadata are changed; or a file of this header."""

    def plant(d: Path, job: Path) -> None:
        if header is not None:
            (d / name).write_bytes(container(header))
            return
        source = path or job / "h2k.safetensors"
        tensors, metadata = load_file(source), dict(Weights(source).metadata)
        change(tensors, metadata)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, d / name, metadata)

    return plant


def adapter(**metadata: object) -> Plant:
    def change(tensors: dict, old: dict) -> None:
        old |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}

    return weights_like(None, "h2k.safetensors", change)


def network(**settings: object) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        metadata["network"] = json.dumps(json.loads(metadata["network"]) | settings)

    return weights_like(None, "h2k.safetensors", change)


def retyped(path: Path | None, name: str, dtype: torch.dtype) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items()}

    return weights_like(path, name, change)


def refilled(path: Path | None, name: str) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        tensors |= {key: torch.full_like(tensor, math.nan) for key, tensor in tensors.items()}

    return weights_like(path, name, change)


MY_ADAPTER = EVALUATE + " --adapter-h2k {d}/h2k.safetensors"
ADAPTER_FILES = [
    *(Row(MY_ADAPTER, "h2k.safetensors", adapter(network=text))
      for text in (NESTED, "{", "null", "[]", "3", '"residual"', "{}", '{"name": null}', '{"name": "other"}')),
    *(Row(MY_ADAPTER, "h2k.safetensors", network(**settings)) for settings in (
        *({"width": 1_000_000}, {"width": 10**30}, {"width": -1}, {"width": 0}, {"width": "64"}, {"width": None}),
        *({"blocks": 10**9}, {"blocks": -1}, {"blocks": 1.5}, {"future": 3}, {"in_channels": 10**9}),
    )),
    *(Row(MY_ADAPTER, "h2k.safetensors", adapter(source_space=name)) for name in ("sdxl", "", NESTED, "kvae_3d_1.0")),
    *(Row(MY_ADAPTER, "h2k.safetensors", adapter(format=name)) for name in ("kvae-latent-adapter/9", "other", "")),
    *(Row(MY_ADAPTER, "", adapter(training=value), code=(0, 2)) for value in (NESTED, "[]", "3", '{"extraction": 3}')),
    *(Row(MY_ADAPTER, "", adapter(metrics=value), code=(0, 2)) for value in (NESTED, '"text"', '{"val_mse": NaN}')),
    *(Row(MY_ADAPTER, "h2k.safetensors", retyped(None, "h2k.safetensors", dtype))
      for dtype in (torch.int8, torch.complex64, torch.bool)),
    Row(MY_ADAPTER, "h2k.safetensors", refilled(None, "h2k.safetensors")),
    *(Row(MY_ADAPTER, "h2k.safetensors", weights_like(None, "h2k.safetensors", lambda t, m: None, header))
      for header in (b"{", b"{}", NESTED.encode(), b"null")),
]  # fmt: skip


def kvae_config(**settings: object) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | settings)

    return weights_like(TINY["kvae"], "kvae.safetensors", change)


def config_text(path: Path, name: str, text: str) -> Plant:
    return weights_like(path, name, lambda tensors, metadata: metadata.update(config=text))


def kvae_without_config(**keys: torch.Tensor) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        del metadata["config"]
        tensors |= {key.replace("__", "."): tensor for key, tensor in keys.items()}

    return weights_like(TINY["kvae"], "kvae.safetensors", change)


def hunyuan_config(**settings: object) -> Plant:
    def change(tensors: dict, metadata: dict) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | settings)

    return weights_like(TINY["hunyuan"], "hunyuan.safetensors", change)


MY_KVAE = RECONSTRUCT + " --kvae {d}/kvae.safetensors"
MY_HUNYUAN = RECONSTRUCT + " --vae hunyuan --hunyuan-vae {d}/hunyuan.safetensors"
CONFIGS = (NESTED, "{", "null", "[]", "3", '"text"')
VAES = [
    *(Row(MY_KVAE, "kvae.safetensors", config_text(TINY["kvae"], "kvae.safetensors", text)) for text in CONFIGS),
    *(Row(MY_KVAE, "kvae.safetensors", kvae_config(**settings)) for settings in (
        *({"num_res_blocks": 10**9}, {"num_res_blocks": -1}, {"num_res_blocks": "1"}, {"z_channels": 10**30}),
        *({"encoder_widths": [2**40] * 4}, {"encoder_widths": [16] * 1000, "decoder_widths": [16] * 1000}),
        *({"norm_groups": 0}, {"norm_groups": -8}, {"temporal_start_level": -3}, {"temporal_start_level": 10**9}),
        *({"encoder_widths": None}, {"z_channels": 1.5}, {"norm": []}),
    )),
    *(Row(MY_KVAE, "kvae.safetensors", kvae_without_config(**{key: torch.zeros(1)})) for key in (
        *("encoder__down__99999999__block__0__conv1__conv__weight", "encoder__down__x__y", "encoder__down__"),
        *("encoder__down__-1__block__0__conv1__conv__weight", f"encoder__down__{'9' * 5000}__x"),
    )),
    *(Row(MY_KVAE, "kvae.safetensors", retyped(TINY["kvae"], "kvae.safetensors", dtype))
      for dtype in (torch.int8, torch.complex64)),
    Row(MY_KVAE, "kvae.safetensors", refilled(TINY["kvae"], "kvae.safetensors")),
    *(Row(MY_HUNYUAN, "config", config_text(TINY["hunyuan"], "hunyuan.safetensors", text)) for text in CONFIGS),
    *(Row(MY_HUNYUAN, "config", hunyuan_config(**settings)) for settings in (
        *({"layers_per_block": 10**9}, {"layers_per_block": 0}, {"layers_per_block": "1"}, {"layers_per_block": None}),
        *({"block_out_channels": [2**40] * 4}, {"block_out_channels": [16] * 100_000}, {"block_out_channels": []}),
        *({"block_out_channels": "abcd"}, {"latent_channels": -16}, {"norm_num_groups": 0}, {"norm_num_groups": 7}),
        *({"down_block_types": ["None"] * 4}, {"act_fn": "none"}, {"act_fn": []}),
    )),
    *(Row(MY_HUNYUAN, "hunyuan.safetensors", retyped(TINY["hunyuan"], "hunyuan.safetensors", dtype))
      for dtype in (torch.int8, torch.complex64)),
    Row(MY_HUNYUAN, "hunyuan.safetensors", refilled(TINY["hunyuan"], "hunyuan.safetensors")),
    Row(MY_KVAE + " --kvae {h2k}", "this is a latent adapter; expected a KVAE-3D"),
    Row(EVALUATE + f" --adapter-h2k {TINY['kvae']}", "this is a KVAE-3D"),
]  # fmt: skip

# Training runs that are to go on, and the logs beside adapters.


@pytest.fixture(scope="module")
def saved(job, tmp_path_factory) -> Path:
    """What a training leaves that Ctrl-C ended: its state and its log."""
    folder = tmp_path_factory.mktemp("saved")
    enter = BetweenSteps.__enter__

    def interrupted(self: BetweenSteps) -> BetweenSteps:
        entered = enter(self)
        signal.raise_signal(signal.SIGINT)
        return entered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BetweenSteps, "__enter__", interrupted)
        assert main(fill(TRAIN, folder, job)) == 130
    return folder


Change = Callable[[dict[str, torch.Tensor], dict[str, str]], object]


def goes_on(saved: Path, d: Path, change: Change = lambda tensors, metadata: None, log: bytes = b"") -> None:
    """The same run in another folder, with its state changed and something appended to its log."""
    shutil.copytree(saved / "a", d / "a")
    with (d / "a" / "train.jsonl").open("ab") as file:
        file.write(log)
    path = d / "a" / "h.resume.safetensors"
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    metadata = {key: text.replace(str(saved), str(d)) for key, text in metadata.items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def progress(**settings: object) -> Change:
    return lambda t, m: m.update(progress=json.dumps(json.loads(m["progress"]) | settings))


def first_tensor(kind: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        key = next(key for key in sorted(tensors) if key.startswith(kind))
        made = make(tensors.pop(key))
        if made is not None:
            tensors[key] = made

    return change


STATES: dict[str, Change] = {
    **{f"progress {text[:9]}": (lambda t, m, text=text: m.update(progress=text)) for text in (*CONFIGS, "{}")},
    **{f"config {text[:9]}": (lambda t, m, text=text: m.update(config=text)) for text in (*CONFIGS, "{}")},
    "no progress": lambda t, m: m.pop("progress"),
    "no config": lambda t, m: m.pop("config"),
    **{f"step {n}": progress(step=n) for n in (-1, 10**30, "1", None, 1.5)},
    **{f"epoch {n}": progress(epoch=n) for n in (-1, 10**30, None)},
    **{f"sums {n}": progress(sums=n) for n in ([], None, [1, 2], ["a", "b", "c"])},
    **{f"best {n}": progress(best_mse=n) for n in ({}, None, {"h2k": "a", "k2h": 1}, [])},
    **{f"no {kind}": first_tensor(kind, lambda tensor: None) for kind in ("live.h2k", "average.k2h", "best.h2k")},
    **{
        f"another {kind}": first_tensor(kind, lambda tensor: torch.zeros(3, 5))
        for kind in ("live.h2k", "average.k2h", "best.h2k", "optimiser0", "optimiser1")
    },
    "an unknown parameter": lambda t, m: t.update({"optimiser0.99999.moment": torch.zeros(3)}),
    "no number": lambda t, m: t.update({"optimiser0.x.moment": torch.zeros(3)}),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_none_is_one_line(kind, job, saved, tmp_path, capsys):
    goes_on(saved, tmp_path, STATES[kind])
    check(Row(TRAIN, "h.resume.safetensors"), tmp_path, job, capsys)


@pytest.mark.parametrize("tail", [b'{"step": 1, "val_', b"nonsense\n", b"null\n[]\n", b"\xff\n", NESTED.encode()])
def test_a_training_goes_on_where_its_log_is_damaged(tail, job, saved, tmp_path, capsys):
    goes_on(saved, tmp_path, log=tail)
    check(Row(TRAIN, code=0), tmp_path, job, capsys)
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "val_h2k" in row] == [0, 1]


def beside_a_log(content: bytes) -> Plant:
    def plant(d: Path, job: Path) -> None:
        shutil.copyfile(job / "h2k.safetensors", d / "h2k.safetensors")
        (d / "train.jsonl").write_bytes(content)

    return plant


LOGS = [
    Row(MY_ADAPTER, "", beside_a_log(content), code=0)
    for content in (
        *(b'{"step": 1, "val_', b"null\n[]\n3\n", b'{"step": "x", "val_h2k": []}\n', b"\xff", NESTED.encode()),
        *(b'{"step": 1, "val_h2k": NaN}\n{"step": 1e400, "val_h2k": 1}\n', b'{"val_h2k": 1}\n{"step": 1}\n'),
    )
]

# Videos of every kind.


def videos(*names: str, content: bytes | None = None) -> Plant:
    """A folder of one good video under these names, or of this content."""

    def plant(d: Path, job: Path) -> None:
        for name in names:
            path = d / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content or (job / "videos" / "v_Wave_g01_c01.mp4").read_bytes())

    return plant


def odd_video_folders(d: Path, job: Path) -> None:
    videos("a.mp4")(d, job)
    os.mkfifo(d / "videos" / "b.mp4")
    (d / "videos" / "c.mp4").symlink_to("absent")
    (d / "videos" / "d.mp4").mkdir()
    (d / "videos" / "e.mp4").symlink_to(d / "videos" / "e.mp4")


def listed(content: bytes) -> Plant:
    def plant(d: Path, job: Path) -> None:
        videos("a.mp4")(d, job)
        (d / "videos" / "trainlist01.txt").write_bytes(content)

    return plant


MY_VIDEOS = EXTRACT + " --videos-root {d}/videos"
VIDEOS = [
    Row(MY_VIDEOS, "", videos("a.mp4", "n" * 246 + ".mp4"), code=(0, 1)),
    Row(MY_VIDEOS, "", videos("caf\udce9.mp4"), code=0),
    Row(MY_VIDEOS, "", videos("a\nb.mp4", " .mp4", "-x.mp4", "%s.mp4"), code=0),
    Row(MY_VIDEOS, "none of the 1 videos", videos("caf\udce9.mp4", content=b"no video")),
    Row(MY_VIDEOS, "none of the 1 videos", videos("a\nb.mp4", content=b"no video")),
    Row(MY_VIDEOS, "", odd_video_folders, code=(0, 1)),
    *(Row(MY_VIDEOS + " --split train", "", listed(content)) for content in (b"\xff\xfe", b"", b"b.avi 1\n", b"\n \n")),
    Row(RECONSTRUCT + " --video-path {d}/videos/a.mp4", "", videos("a.mp4", content=b"\x00" * 4096)),
    Row(RECONSTRUCT + " --video-path {d}/videos/a.m3u8", "", videos("a.m3u8", content=b"#EXTM3U\n/etc/passwd\n")),
]  # fmt: skip

GROUPS = {
    **{"outputs": OUTPUTS, "overwriting": OVERWRITING, "options": OPTIONS, "reading": READING, "pairs": PAIRS},
    **{"manifests": MANIFESTS, "shards": SHARDS, "adapters": ADAPTER_FILES, "vaes": VAES},
    **{"logs": LOGS, "videos": VIDEOS},
}
ROWS = [
    pytest.param(row, id=f"{group} {i} {row.command.split()[0]} {' '.join(row.command.split()[-2:])[:40]!a}")
    for group, rows in GROUPS.items()
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_one_line_and_leaves_nothing(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)


# And the other side: what people share tells nothing of the machine it was made on.


def test_no_file_that_people_share_names_a_folder_of_this_machine(job, tmp_path):
    assert main(fill(EXTRACT + " --max-clips 4", tmp_path, job)) == 0
    assert main(fill(PACK + " --latent-root {d}/l", tmp_path, job)) == 0
    assert main(fill(TRAIN, tmp_path, job)) == 0
    mine = " --adapter-h2k {d}/a/h.safetensors --adapter-k2h {d}/a/k.safetensors"
    assert main(fill(PIXELS + mine, tmp_path, job)) == 0
    assert main(fill(RECONSTRUCT, tmp_path, job)) == 0
    shared = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in shared} >= {".json", ".jsonl", ".safetensors", ".html", ".md", ".txt", ".png"}
    telling = str(tmp_path.parent).encode()
    assert [path.name for path in shared if telling in path.read_bytes()] == []


def test_no_json_holds_what_json_does_not_have(job, tmp_path):
    """NaN and Infinity are Python's alone; other readers refuse the file."""

    def refuse(text: str) -> None:
        raise AssertionError(text)

    adapter(metrics='{"val_mse": NaN, "more": [Infinity]}', training='{"pairs": -Infinity}')(tmp_path, job)
    assert main(fill(MY_ADAPTER, tmp_path, job)) == 0
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)


# Damage at random: whatever is cut off or turned over, it is read as something, or refused in a line.

FOREIGN = {  # of each kind of file: its path, and what reads all of it
    "pair": ("latents/v_Wave_g01_c01" + SUFFIX, lambda d: list(open_pairs(d / "latents"))),
    "shard": ("shards/00000.safetensors", lambda d: every_pair(d / "shards")),
    "index": ("shards/index.json", lambda d: every_pair(d / "shards")),
    "manifest": ("latents/manifest.json", lambda d: read_spaces(d / "latents")),
    "adapter": ("h2k.safetensors", lambda d: load_adapter(d / "h2k.safetensors").about()),
    "kvae": ("kvae.safetensors", lambda d: load_kvae_for_training(str(d / "kvae.safetensors"), "cpu")),
    "hunyuan": ("hunyuan.safetensors", lambda d: load_hunyuan_vae(str(d / "hunyuan.safetensors"), "cpu")),
    "state": ("a/h.resume.safetensors", lambda d: open_state(d / "a" / "h.resume.safetensors", NoSettings())),
    "log": ("a/train.jsonl", lambda d: read_log(d / "a" / "train.jsonl")),
}
DAMAGES = 25  # of each kind


@dataclass
class NoSettings:
    """Those of a run whose state any other may go on from."""


def every_pair(root: Path) -> list[tuple[str, Pair]]:
    pairs = open_pairs(root)
    return [(pairs.name(i), pairs[i]) for i in range(len(pairs))]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off somewhere, or with a few bits turned over, most often where the headers are."""
    if rng.random() < 0.3:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        end = min(len(data), 4096) if rng.random() < 0.7 else len(data)
        changed[rng.integers(end)] ^= 1 << rng.integers(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", FOREIGN)
def test_damage_of_any_kind_is_read_or_refused_in_a_line(kind, job, saved, tmp_path):
    shutil.copytree(job, tmp_path, dirs_exist_ok=True, ignore=lambda folder, names: {"videos"} & set(names))
    shutil.copytree(saved / "a", tmp_path / "a")
    for name, path in TINY.items():
        shutil.copyfile(path, tmp_path / f"{name}.safetensors")
    name, read = FOREIGN[kind]
    good = (tmp_path / name).read_bytes()
    read(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(DAMAGES):
        (tmp_path / name).write_bytes(damaged(good, rng))
        with broken_off(SECONDS), suppress(UserError, WeightsError):
            read(tmp_path)


@pytest.mark.parametrize("change", ABSURD)
def test_a_pair_asks_for_no_more_of_its_video_than_its_latents_are_of(change, job):
    with pytest.raises((UserError, ValueError), match="which its latents|expected"):
        pair = Pair(**latents(), source=replace(SOURCE, **change))
        original_frames("a", pair, str(job / "videos"))
