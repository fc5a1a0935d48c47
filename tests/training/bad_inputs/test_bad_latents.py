"""Files that are not latents, latents that cannot be decoded, and videos and options that cannot be encoded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import needs
from bad_rows import DECODE, ENCODE, INSPECT, NESTED, Plant, Row, check, container, make_job

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

Z = torch.ones(1, 16, 2, 4, 4)


def latent(content: bytes | None = None, name: str = "a.latent") -> Plant:
    """A file with this content; with None it is a named pipe."""

    def plant(d: Path, job: Path) -> None:
        if content is None:
            os.mkfifo(d / name)
        else:
            (d / name).parent.mkdir(exist_ok=True)
            (d / name).write_bytes(content)

    return plant


def tensors(metadata: dict[str, str] | None = None, **values: torch.Tensor) -> bytes:
    return save({key: each.contiguous() for key, each in values.items()}, metadata)


HUGE = {"latent_tensor": {"dtype": "F32", "shape": [1, 16, 1 << 40, 4, 4], "data_offsets": [0, 1 << 50]}}
UNREADABLE = {
    "empty": b"",
    "text": b"no latent",
    "pipe": None,
    "cut short": tensors(latent_tensor=Z)[:-16],
    "claims more than it holds": container(json.dumps(HUGE).encode()),
    "nested header": container(NESTED.encode()),
    "no latent": tensors(weight=Z[0, 0, 0]),
    "NaN": tensors(latent_tensor=Z * torch.nan, latent_format_version_0=torch.empty(0)),
    "integers": tensors(latent_tensor=Z.int()),
    "three sides": tensors(latent=Z[0, 0]),
    "wan": tensors({"architecture": "wan"}, latents_2x4x4_float32=Z[0]),
    "parts that are not there": tensors({"kvae_parts": "3"}, latent_tensor=Z),
    "a number with 5000 digits": tensors({"kvae_frames": "9" * 5000}, latent_tensor=Z),
}
UNDECODABLE = {
    "an image latent": tensors(latent_tensor=Z[:, :, 0], latent_format_version_0=torch.empty(0)),
    "channels of no space": tensors(latent_tensor=Z[:, :12], latent_format_version_0=torch.empty(0)),
    "no space": tensors(latent_tensor=Z, latent_format_version_0=torch.empty(0)),
    "an unknown space": tensors({"kvae_space": "wan"}, latent_tensor=Z),
}
ROWS = [
    *(Row(DECODE, "none of the 1 files could be decoded", latent(each)) for each in UNREADABLE.values()),
    *(Row(INSPECT, "none of the 1 files could be read", latent(each)) for each in UNREADABLE.values()),
    *(Row(DECODE, "none of the 1 files could be decoded", latent(each)) for each in UNDECODABLE.values()),
    Row(DECODE, "none of the 1 files could be decoded"),
    Row("decode {d}/a.pt --output {d}/o", "none of the 1 files", latent(b"a pickle", "a.pt")),
    Row("decode {d}/folder --output {d}/o", "no .latent, .safetensors files in it", latent(b"", "folder/x.txt")),
    Row("decode {d}/folder --output {d}/o", "no .latent", latent(b"", "folder/x_hv_te.safetensors")),
    *(Row(f"{DECODE} {rest}", rest.split()[0]) for rest in ("--fps 0", "--fps nan", "--crf 52", "--format gif",
      "--codec vp9", "--scaling half", "--model wan", "--memory-gb -1", "--dtype fp8", "--kvae ''")),
    Row(DECODE + " --kvae {d}/absent.safetensors", "absent.safetensors", latent(UNDECODABLE["no space"])),
    Row(ENCODE + " --adapter-k2h {d}/absent.safetensors", "absent.safetensors"),
    Row(ENCODE + " --adapter-k2h {h2k}", "swapped"),
    Row(ENCODE + " --space hunyuan_video_1.5", "needs an adapter"),
    *(Row(f"{ENCODE} {rest}", rest.split()[0]) for rest in ("--height 32", "--height 36 --width 32", "--height -8",
      "--height 99999 --width 8", "--space wan", "--format gguf", "--format musubi --space kvae_3d_1.0")),
    Row("encode {d}/a.mp4 --output {d}/o --device cpu", "none of the 1 files", latent(b"no video", "a.mp4")),
    Row("encode {d}/a.mp4 --output {d}/o --device cpu", "none of the 1 files", latent(None, "a.mp4")),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=Row.name)
def test_latents_that_cannot_be_read_decoded_or_made_are_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
