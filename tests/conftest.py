"""Shared by all tests: a small model, generated videos, and the folder of real clips if there is one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvae_comfyui.kvae import KVAE, KVAEConfig
from kvae_comfyui.serving.video_writer import write_video

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_kvae() -> KVAE:
    """A KVAE-3D-1.0 of 32 channels with random weights everywhere, in a shape that diffusers supports too."""
    kvae = KVAE(KVAEConfig((32, 64, 64, 64), (32, 64, 64, 64), num_res_blocks=1)).eval().requires_grad_(False)
    for parameter in kvae.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return kvae


def shared(name: str) -> Path:
    """A file or folder of the shared clips and weights; skips the test if it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs shared/{name}: put the folder `shared`, with real clips and weights, next to this checkout")
    return path


def moving_picture(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Coloured waves that drift, uint8 [3, T, H, W]."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x * a + y * b + t * c) for a, b, c in rng.uniform(0.05, 0.3, (3, 3))]
    return torch.from_numpy((127.5 + 100 * np.stack(waves)).astype(np.uint8))


def make_videos(folder: Path, count: int, frames: int = 20, height: int = 48, width: int = 64) -> list[Path]:
    """Write small mp4 files with names as in UCF101: v_Wave_g01_c01.mp4 …"""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"v_Wave_g{i + 1:02d}_c01.mp4" for i in range(count)]
    for i, path in enumerate(paths):
        write_video(path, moving_picture(frames, height, width, seed=i), 25)
    return paths
