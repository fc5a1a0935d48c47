"""What a row of the toy gives with one seed: trained and judged once, then read from a file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.toy.base import base_network
from kvae_comfyui.benchmarks.toy.embedder import embedder
from kvae_comfyui.benchmarks.toy.judge import judge
from kvae_comfyui.benchmarks.toy.lora import train_lora
from kvae_comfyui.benchmarks.toy.rows import OURS, Row
from kvae_comfyui.kvae.files import Weights, save_weights
from kvae_comfyui.kvae.paths import sha256_of


@dataclass(frozen=True)
class Found:
    """What one training gave.

    Attributes:
        metrics: [held-out sprites, METRICS].
        share: L_distill / mean v_T² at its end.
        seconds: of a core.
    """

    metrics: Tensor
    share: float
    seconds: float


def prepare(work: Path, rows: Sequence[Row], pool: Executor) -> None:
    """Train the base, and beside it the embedders that the rows need, if they are not there yet."""
    noises = list(dict.fromkeys((row.noise, row.backbone_noise) for row in (OURS, *rows)))
    for job in [pool.submit(_train_base, work), pool.submit(_train_embedders, work, noises)]:
        job.result()


def _train_base(work: Path) -> None:
    torch.set_num_threads(1)  # the networks are too small for more
    base_network(work)


def _train_embedders(work: Path, noises: Sequence[tuple[float, float]]) -> None:
    torch.set_num_threads(1)
    for each in noises:
        embedder(work, *each)


def measure(work: Path, name: str, row: Row | None, seed: int) -> Found:
    """Train and judge a row, unless the same was measured before on the same base; without a row, judge the base."""
    torch.set_num_threads(1)
    file = work / "results" / f"{re.sub(r'[^0-9a-zλ]+', '_', name)}-{seed}.safetensors"
    about = json.dumps({"row": asdict(row) if row else None, "base": sha256_of(work / "base.safetensors")})
    saved = Weights(file) if file.exists() else None
    if saved is None or saved.metadata["about"] != about:
        network, start = base_network(work), time.process_time()
        share = train_lora(network, embedder(work, row.noise, row.backbone_noise), row, seed) if row else 0.0
        seconds = time.process_time() - start
        tensors = {
            "metrics": judge(network, embedder(work, OURS.noise, OURS.backbone_noise)),
            "figures": torch.tensor([share, seconds]),
        }
        file.parent.mkdir(exist_ok=True)
        save_weights(file, tensors, {"about": about})
        saved = Weights(file)
    return Found(saved["metrics"].clone(), *saved["figures"].tolist())
