"""Extraction with VAEs of full size, beside one clip at a time in diffusers, in float32 and in bfloat16."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch

from kvae_comfyui.benchmarks.extraction import extract_with, one_at_a_time, plain_hunyuan, plain_kvae
from kvae_comfyui.benchmarks.gpu.measure import FAILED, NO_TIME, Run, Share, attempt, interleaved, shown
from kvae_comfyui.benchmarks.gpu.models import made_on, random_hunyuan, random_kvae
from kvae_comfyui.benchmarks.gpu.setup import Setup, shape_text
from kvae_comfyui.serving.sample_clip import sample_clip
from kvae_comfyui.serving.video_writer import write_video
from kvae_comfyui.training.data.extract import ExtractConfig
from kvae_comfyui.training.data.pairs import find_pairs, read_pair
from kvae_comfyui.training.data.precision import DTYPES
from kvae_comfyui.training.hunyuan import replace_convolutions
from kvae_comfyui.training.hunyuan_whole import see_whole_clips
from kvae_comfyui.training.vaes import KVAE3D, HunyuanVAE

MEASURED = ("float32", "bfloat16")


def section(setup: Setup) -> Iterator[str]:
    """A row for each precision, and how far apart their latents are."""
    yield f"## Extraction, {setup.clips} clips of {shape_text(setup.clip_size)}, seconds / GB"
    yield ""
    yield "HunyuanVideo's VAE and KVAE-3D-1.0, random weights. *one at a time*: in the modules of diffusers, in a loop."
    yield ""
    yield "| | one at a time | extract | ratio |"
    yield "|---|---|---|---|"
    share = Share(setup.shares["extraction"])
    with tempfile.TemporaryDirectory() as folder:
        write_videos(setup, Path(folder, "videos"))
        for dtype in MEASURED:
            measured = None if share.is_over else attempt(partial(row, setup, dtype, Path(folder)), setup.device)
            cells = measured or [NO_TIME if share.is_over else FAILED, "", ""]
            yield f"| {dtype} | {' | '.join(cells)} |"
        errors = differences(Path(folder))
    if errors:
        setup.figures["bfloat16 latents"] += errors.values()
        parts = [f"{error:.3%} of {name}'s" for name, error in errors.items()]
        yield ""
        yield f"Latents in bfloat16 differ from those in float32 by {' and '.join(parts)} variance (squared error)."


def row(setup: Setup, dtype: str, folder: Path) -> list[str]:
    """Measure one precision. The pairs of the last turn of `extract` stay in folder/dtype."""
    ours = vaes(setup, DTYPES[dtype])
    theirs = plain_hunyuan(ours[0]), plain_kvae(ours[1])
    numbers = count()

    def config() -> ExtractConfig:
        return config_of(setup, folder / "videos", folder / dtype / str(next(numbers)), dtype)

    runs: dict[str, Run] = {
        "one at a time": lambda: one_at_a_time(config(), *theirs),
        "extract": lambda: extract_with(config(), *ours),
    }
    costs = interleaved(runs, setup.device, setup.row_seconds)
    plain, fast = costs["one at a time"], costs["extract"]
    if plain and fast:
        setup.figures[f"extraction, {dtype}"].append(plain.seconds / fast.seconds)
    return [shown(plain), shown(fast), f"{plain.seconds / fast.seconds:.2f}x" if plain and fast else "–"]


def vaes(setup: Setup, dtype: torch.dtype) -> tuple[HunyuanVAE, KVAE3D]:
    """Both VAEs as `extract` loads them. They have the same weights in every precision, rounded."""
    hunyuan = random_hunyuan(setup, torch.float32)
    with made_on(setup.device, torch.float32):
        replace_convolutions(hunyuan)
    see_whole_clips(hunyuan)
    kvae = random_kvae(setup.family["1.0"], setup.device, torch.float32)
    hunyuan, kvae = (vae.to(dtype).eval().requires_grad_(False) for vae in (hunyuan, kvae))
    return HunyuanVAE(hunyuan, "random", ""), KVAE3D(kvae.fold(), "random", "")


def config_of(setup: Setup, videos: Path, out: Path, dtype: str) -> ExtractConfig:
    """The settings of both sides."""
    frames, height, width = setup.clip_size
    return ExtractConfig(
        str(videos),
        str(out),
        max_clips=setup.clips,
        num_frames=frames,
        height=height,
        width=width,
        fit="stretch",
        device=str(setup.device),
        dtype=dtype,
    )


def write_videos(setup: Setup, folder: Path) -> None:
    """A video for each clip, each with its own offset, every other one darker."""
    folder.mkdir()
    frames = (255 * sample_clip(*setup.clip_size)).byte().permute(3, 0, 1, 2)
    for i in range(setup.clips):
        write_video(folder / f"{i}.mp4", (frames.roll(i * 7, -1) // (1 + i % 2)).contiguous(), 25)


def differences(folder: Path) -> dict[str, float]:
    """Squared error of bfloat16's latents divided by the variance of float32's; empty if one is missing."""
    last = {dtype: find_last(folder / dtype) for dtype in MEASURED}
    if not all(last.values()):
        return {}
    exact, rounded = ([read_pair(path) for path in find_pairs(each)] for each in last.values() if each)
    errors = {}
    for name, key in (("HunyuanVideo", "z_h"), ("KVAE", "z_k")):
        a, b = (torch.stack([getattr(pair, key).double() for pair in pairs]) for pairs in (exact, rounded))
        errors[name] = ((a - b).square().mean() / a.var()).item()
    return errors


def find_last(folder: Path) -> Path | None:
    """The folder of pairs that was written last."""
    return max(folder.glob("*"), key=lambda each: int(each.name), default=None)
