"""Bad input to commands: a row is a command, and words of the line of error with which it must end.

To add one: `Row(command, words of the line, plant)`. In a command, {d} is an empty folder of this row, {job} is the
folder of good files that all rows share, and {h2k} and {k2h} are its adapters. `plant` gets both folders and writes bad
files into {d} before the command runs. A row with the code (0, 2) may also succeed: the test then checks that it ends.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save, save_file

from at_step import at_step, ctrl_c
from conftest import make_videos
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import SUFFIX, Pair, Source, write_pair
from kvae_comfyui.training.vaes import TINY_ADAPTERS, load_hunyuan_vae, load_kvae_for_training

SECONDS = 60  # time limit of a command
SHAPE = (16, 3, 6, 8)
SOURCE = Source("v_Wave_g01_c01.mp4", 0, 9, 0, 48, 64)


def make_job(tmp_path_factory) -> Path:
    """Make videos, a pair of each, a shard of these pairs, and copies of both embedded adapters."""
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
    leaves: tuple[str, ...] = ()  # files and folders in {d} that a refusal may leave

    def name(self) -> str:
        """The id of the test."""
        return f"{self.command.split()[0]} {' '.join(self.command.split()[-2:])[:40]!a}"


@contextmanager
def broken_off(seconds: int) -> Iterator[None]:
    """Fail the test if the context lasts longer."""

    def stop(*_):
        pytest.fail(f"it does not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files(folder: Path) -> dict[str, object]:
    """Everything in a folder by its path: the content of a file, the mode of anything else."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if plain else path.lstat().st_mode
    return found


def fill(command: str, d: Path, job: Path) -> list[str]:
    """The words of a command, with its places filled in."""
    places = {"d": d, "job": job, "h2k": job / "h2k.safetensors", "k2h": job / "k2h.safetensors", "long": "n" * 300}
    return [word.format(**places, nul="\0", latin="caf\udce9") for word in shlex.split(command)]


def check(row: Row, d: Path, job: Path, capsys) -> None:
    """Run a row. A refusal ends in one line of error, says the row's words, and changes no file."""
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
TRAIN = "train --latent-root {job}/latents --epochs 1 --batch-size 2" + OUT + CPU
ADAPTERS = " --adapter-h2k {h2k} --adapter-k2h {k2h}"
EVALUATE = "evaluate --latent-root {job}/latents --output-root {d}/e --num-pixel-samples 1" + ADAPTERS + CPU
PIXELS = EVALUATE + " --videos-root {job}/videos"
RECONSTRUCT = (
    "reconstruct --video-path {job}/videos/v_Wave_g01_c01.mp4 --output {d}/r.mp4 --num-frames 9 --height 48 --width 64"
    + CPU
)
DECODE = "decode {d}/a.latent --output {d}/o" + CPU
ENCODE = "encode {job}/videos/v_Wave_g01_c01.mp4 --output {d}/o" + CPU
INSPECT = "inspect {d}/a.latent"
TINY_COMMAND = "tiny --videos-root {job}/videos --output {d}/t.safetensors" + CPU
DEMO = "demo --videos {job}/videos --output-root {d}/demo" + CPU
ADAPTERS_COMMAND = "adapters --videos-root {job}/videos --output {d}/o --num-frames 9 --height 48 --width 64" + CPU
FETCH = "fetch --model KVAE-3D-1.0 --output {d}/m"

MINE = " --latent-root {d}/latents"
ON_PAIRS = (TRAIN + MINE, EVALUATE + MINE, PACK + MINE)
NESTED = "[" * 100_000
NO_OBJECTS = (NESTED, "{", "null", "[]", "3", '"text"')  # none of them is a JSON object


def plant_places(d: Path, job: Path) -> None:
    (d / "file").write_text("a file")
    (d / "folder").mkdir()
    (d / "loop").symlink_to(d / "loop")
    os.mkfifo(d / "pipe")


def first_pair(content: bytes | None = None, name: str = "v_Wave_g01_c01") -> Plant:
    """A copy of the pairs in which the first has this content and this name; with None it is a named pipe."""

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
    """The bytes of a safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def pair_of(tensors: dict[str, torch.Tensor], source: object = None) -> bytes:
    metadata = None if source is None else {"source": source if isinstance(source, str) else json.dumps(source)}
    return packed(save(tensors, metadata))


def latents(dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = SHAPE, fill: float | None = None) -> dict:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if fill is None else torch.full(shape, fill)
    return {"z_h": z.to(dtype), "z_k": z.flip(0).to(dtype).clone()}


def weights_like(
    path: Path | None, name: str, change: Callable[[dict, dict], object], header: bytes | None = None
) -> Plant:
    """Write {d}/NAME: a good file with changed tensors and metadata, or a file with this header and no data."""

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


MY_ADAPTER = EVALUATE + " --adapter-h2k {d}/h2k.safetensors"


def make_saved(job: Path, tmp_path_factory) -> Path:
    """Interrupt a training with Ctrl-C; return the folder of its state and its log."""
    folder = tmp_path_factory.mktemp("saved")
    with at_step(1, ctrl_c):
        assert main(fill(TRAIN, folder, job)) == 130
    return folder
