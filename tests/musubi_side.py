"""musubi-tuner's own datasets and caching scripts, run beside ours."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

import needs

SHORT = {"hunyuan_video": "hv", "hunyuan_video_1.5": "hv15", "kandinsky5": "k5"}
SCRIPTS = {
    "hunyuan_video": "cache_latents",
    "hunyuan_video_1.5": "hv_1_5_cache_latents",
    "kandinsky5": "kandinsky5_cache_latents",
}


@dataclass
class Extracted:
    """One item that musubi-tuner extracts. `frames` are uint8 [T, H, W, 3]."""

    frames: np.ndarray
    size: tuple[int, int]
    count: int | None


def datasets_of(monkeypatch, config: Path, architecture: str) -> list[Any]:
    """musubi-tuner's datasets. They honour enable_bucket and bucket_no_upscale for videos, as versions after 0.3.4."""
    utils = needs.musubi_module(monkeypatch, "dataset.config_utils")
    made = utils.BlueprintGenerator(utils.ConfigSanitizer()).generate(
        utils.load_user_config(str(config)), argparse.Namespace(debug_dataset=False), architecture=SHORT[architecture]
    )
    return utils.generate_dataset_group_by_blueprint(made.dataset_group).datasets


def extracted_by_musubi(monkeypatch, config: Path, architecture: str) -> dict[str, Extracted]:
    """What musubi-tuner's datasets give its encoder, by the path of the cache file."""
    found = {}
    for dataset in datasets_of(monkeypatch, config, architecture):
        module = needs.musubi_module(monkeypatch, "dataset.image_video_dataset")
        selector = needs.musubi_module(monkeypatch, "dataset.bucket").BucketSelector
        settings = dataset.enable_bucket, dataset.bucket_no_upscale, dataset.architecture
        with monkeypatch.context() as patched:
            patched.setattr(module, "BucketSelector", honouring(selector, *settings))
            for _, batch in dataset.retrieve_latent_cache_batches(1):
                for item in batch:
                    frames = item.content if item.content.ndim == 4 else item.content[None]
                    count = item.frame_count
                    path = os.path.normpath(item.latent_cache_path)
                    found[path] = Extracted(frames[..., :3], item.original_size, count)
    return found


def honouring(selector: Any, *settings: object) -> Any:
    """A BucketSelector that has the settings of its dataset, whatever it is given."""

    class Honouring(selector):
        def __init__(self, resolution, *_, **__):
            super().__init__(resolution, *settings)

    return Honouring


class _Encoded(NamedTuple):
    latent_dist: Any


class Stand:
    """An object that musubi-tuner's scripts take for their VAE."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor]):
        self.compute = encode
        self.device, self.dtype = torch.device("cpu"), torch.float16
        self.config = SimpleNamespace(scaling_factor=0.476986)

    def eval(self) -> Stand:
        return self

    def to(self, *_: object, **__: object) -> Stand:
        return self

    def encode(self, x: torch.Tensor) -> _Encoded:
        with torch.autocast("cpu", enabled=False):
            z = self.compute(x.float()).to(x.dtype).contiguous()
        return _Encoded(SimpleNamespace(sample=lambda: z, mode=lambda: z))


def run_musubi(monkeypatch, config: Path, architecture: str, encode: Callable, *options: str) -> None:
    """Run musubi-tuner's caching script with `encode` in the place of its VAE."""
    script = needs.musubi_module(monkeypatch, SCRIPTS[architecture])
    with monkeypatch.context() as patched:
        stand = Stand(encode)
        if architecture == "hunyuan_video":
            patched.setattr(script, "load_vae", lambda **_: (stand, None, 8, 4))
        elif architecture == "kandinsky5":
            patched.setattr(script, "build_vae", lambda _: stand)
        else:
            patched.setattr(script.hunyuan_video_1_5_vae, "load_vae_from_checkpoint", lambda *_, **__: stand)
        argv = ["script", "--dataset_config", str(config), "--vae", "stand", "--device", "cpu", "--num_workers", "1"]
        patched.setattr("sys.argv", [*argv, *options])
        script.main()
