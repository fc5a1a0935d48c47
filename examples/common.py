"""What the examples share: their options, the VAE, and the file they write."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from kvae_comfyui.serving.pipeline_vae import PipelineVAE
from kvae_comfyui.serving.remaining import ProgressText
from kvae_comfyui.serving.video_writer import VideoWriter
from kvae_comfyui.training.options import MOST_SEED, add_options, check_options, option
from kvae_comfyui.training.served import ServedOptions, load_served

FPS = 24  # of HunyuanVideo, SkyReels and Kandinsky 5
OWN = "; 0 takes the pipeline's own"


@dataclass(kw_only=True)
class Options(ServedOptions):
    """The options of every example. Those of KVAE are the same as in `python -m training decode`."""

    prompt: str = option(..., "what the video shows", metavar="TEXT")
    negative_prompt: str = option("", "what it does not show, where the pipeline uses that", metavar="TEXT")
    output: str = option("video.mp4", "the video", writes="file")
    height: int = option(0, "rows of pixels" + OWN, least=0)
    width: int = option(0, "columns of pixels" + OWN, least=0)
    steps: int = option(0, "steps of the sampler" + OWN, least=0)
    seed: int = option(0, "seed of the noise", least=0, most=MOST_SEED)


@dataclass(kw_only=True)
class DiffusersOptions(Options):
    """Those of the pipelines of diffusers."""

    model: str = option("", "the pipeline: a folder or a hub id; empty takes the usual one", metavar="MODEL")
    image: str = option("", "the picture that the video begins with")
    frames: int = option(0, "4n + 1 frames" + OWN, least=0)


T = TypeVar("T", bound=Options)


def parse(config: type[T], description: str | None, argv: list[str] | None) -> T:
    """The options of an example, checked before the models are loaded.

    Raises:
        UserError: names the option, its value and what was expected.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, config)
    options = config(**vars(parser.parse_args(argv)))
    check_options(options)
    return options


def load_vae(options: Options, space: str, encodes: bool = False) -> PipelineVAE:
    """KVAE in the place of the VAE whose latents are those of `space`. It says how long a long decode still takes.

    Args:
        encodes: whether it must encode, too, for which it needs the adapter of the other direction.

    Raises:
        UserError, WeightsError: as `load_served`.
    """
    host = load_served(options, space, ("decode", "encode") if encodes else ("decode",))
    host.on_progress = partial(_show, ProgressText())
    return PipelineVAE(host)


def inputs(options: DiffusersOptions) -> dict[str, Any]:
    """The arguments of a pipeline's call; those that were not given are left to the pipeline."""
    given = {
        "negative_prompt": options.negative_prompt,
        "image": options.image and Image.open(options.image).convert("RGB"),
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "num_inference_steps": options.steps,
    }
    generator = torch.Generator().manual_seed(options.seed)
    always = {"prompt": options.prompt, "generator": generator, "output_type": "pt"}
    return always | {name: value for name, value in given.items() if value}


def write(options: Options, frames_T3HW: Tensor) -> None:
    """Write frames [T, 3, H, W], in 0..1 or uint8, as a video."""
    *_, height, width = frames_T3HW.shape
    with VideoWriter(options.output, width, height, FPS) as writer:
        writer.write(frames_T3HW.movedim(1, 3).cpu())


def _show(progress: ProgressText, done: int, total: int) -> None:
    if text := progress.after(done, total):
        print(f"KVAE: {text}", flush=True)
