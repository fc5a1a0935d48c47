"""`extract` compared with one clip at a time by the same VAEs: seconds, interleaved in one run.

    python -m benchmarks.extraction --videos-root UCF101 --clips 24
    python -m benchmarks.extraction --videos-root VIDEOS --clips 24 --clips-per-video 8

The published pairs were made one at a time: decode the video, cut and resize, encode with one VAE and then with
the other in the modules of diffusers, compress, write; then the next clip. (diffusers has no module for a KVAE other
than KVAE-3D-1.0.) Both sides have one thread for PyTorch and one for the video decoder, cut the same windows and make
the same pairs, which is checked. Loading the VAEs is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLKVAEVideo
from torch import Tensor

from kvae_comfyui.kvae import KVAEConfig, pad_frames
from kvae_comfyui.kvae.load import official_key
from kvae_comfyui.kvae.pixels import KVAE_HALF_RANGE, to_unit
from kvae_comfyui.training.data import extract
from kvae_comfyui.training.data.pairs import SUFFIX, Pair, Source, find_pairs, read_pair, write_pair
from kvae_comfyui.training.data.videos import cut, find_videos, read_clip
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.options import DEVICE
from kvae_comfyui.training.vaes import KVAE3D, HunyuanVAE, VideoVAE, load_hunyuan_vae, load_kvae_for_training


def main() -> None:
    """Time both sides in turns, check that they made the same pairs, and print the ratio."""
    options = parse_options()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"one at a time": [], "extract": []}
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options)
        ours = load_hunyuan_vae(config.hunyuan_vae, config.device), load_kvae_for_training(config.kvae, config.device)
        sides = {
            "one at a time": partial(one_at_a_time, config, plain_hunyuan(ours[0]), plain_kvae(ours[1])),
            "extract": partial(extract_with, config, *ours),
        }
        for n in range(options.rounds):
            for name, side in sides.items():
                config.output_root = os.path.join(folder, f"{name} {n}")
                start = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - start)
                print(f"round {n + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
            check_same(Path(folder, f"one at a time {n}"), Path(folder, f"extract {n}"))
    theirs, took = (statistics.median(each) for each in seconds.values())
    print(f"{options.clips} clips of {options.size}, medians of {options.rounds}: {theirs:.1f} s → {took:.1f} s")
    print(f"ratio {theirs / took:.2f}")


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True, help="folder of videos")
    parser.add_argument("--clips", type=int, default=16, help="clips per round (default 16)")
    parser.add_argument("--clips-per-video", type=int, default=1, help="clips of one video (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each side (default 3)")
    parser.add_argument("--hunyuan-vae", default="tiny", help="as for extract (default tiny)")
    parser.add_argument("--kvae", default="tiny", help="as for extract (default tiny)")
    parser.add_argument("--size", default="33x128x128", help="FRAMESxHEIGHTxWIDTH (default 33x128x128)")
    parser.add_argument("--batch-size", type=int, default=extract.BATCH_SIZE, help="as for extract")
    parser.add_argument("--device", default=DEVICE, help="device of both VAEs")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> extract.ExtractConfig:
    """The settings of both sides, except for the folder to write to."""
    frames, height, width = map(int, options.size.split("x"))
    return extract.ExtractConfig(
        videos_root=options.videos_root,
        output_root="",
        hunyuan_vae=options.hunyuan_vae,
        kvae=options.kvae,
        max_clips=options.clips,
        clips_per_video=options.clips_per_video,
        num_frames=frames,
        fit="stretch",
        height=height,
        width=width,
        batch_size=options.batch_size,
        device=options.device,
        dtype="float32",  # as the other side
    )


def extract_with(config: extract.ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE) -> None:
    """Run `extract` with VAEs that are already loaded."""
    loaded: dict[str, Any] = {"load_hunyuan_vae": lambda *_: hunyuan, "load_kvae_for_training": lambda *_: kvae}
    with contextlib.redirect_stdout(io.StringIO()), patch.multiple(extract, **loaded):
        extract.run(config)


def plain_hunyuan(hunyuan: HunyuanVAE) -> HunyuanVAE:
    """The same weights in diffusers' own module, without its tiles in time, so that both sides make the same pairs."""
    vae = type(hunyuan.vae).from_config(hunyuan.vae.config)
    vae.load_state_dict(hunyuan.vae.state_dict())
    vae.use_framewise_encoding = False
    return HunyuanVAE(vae.to(hunyuan.vae.device, hunyuan.vae.dtype).eval(), hunyuan.source, hunyuan.digest)


def plain_kvae(kvae: KVAE3D) -> KVAE3D:
    """The same weights in diffusers' own module, if it has one."""
    return DiffusersKVAE(kvae) if kvae.kvae.config == KVAEConfig() else kvae


class DiffusersKVAE(KVAE3D):
    """KVAE-3D-1.0 as diffusers runs it."""

    def __init__(self, kvae: KVAE3D):
        super().__init__(kvae.kvae, kvae.source, kvae.digest)
        state = kvae.kvae.unfold().state_dict()
        kvae.kvae.fold()
        vae: Any = AutoencoderKLKVAEVideo()
        vae.load_state_dict({key: state[official_key(key)] for key in vae.state_dict()})
        self.vae = vae.to(next(kvae.kvae.parameters())).eval()

    @torch.inference_mode()
    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [B, 3, T, H, W] → raw latents, the posterior's mode."""
        x = pad_frames(to_unit(x_B3THW.to(self.vae.device), KVAE_HALF_RANGE))
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode().float()


def one_at_a_time(config: extract.ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE) -> None:
    """Extract in a plain loop: nothing overlaps, and every window decodes its video from the start."""
    root, out = Path(config.videos_root), Path(config.output_root)
    left = config.max_clips
    for video in find_videos(root):
        for i, clip in enumerate(cut(video, config.num_frames, config.clips_per_video)):
            if not left:
                return
            left -= 1
            try:
                frames = read_clip(clip, config.height, config.width)
            except UserError:
                continue
            z_h, z_k = hunyuan.encode(frames[None])[0], kvae.encode(frames[None])[0]
            relative = video.relative_to(root)
            stem = relative.stem if config.clips_per_video == 1 else f"{relative.stem}.{i:03d}"
            source = Source(relative.as_posix(), clip.first, frames.shape[1], 0, config.height, config.width)
            write_pair(out / relative.parent / (stem + SUFFIX), Pair(z_h, z_k, source))


def check_same(plain: Path, ours: Path) -> None:
    """Exit unless both sides made the same pairs, up to the last bits of fp16."""
    one, other = ([path.relative_to(root) for path in find_pairs(root)] for root in (plain, ours))
    if one != other:
        raise SystemExit(f"the two sides made {len(one)} and {len(other)} pairs, or pairs of different names")
    for path in one:
        a, b = read_pair(plain / path), read_pair(ours / path)
        for x, y in ((a.z_h, b.z_h), (a.z_k, b.z_k)):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


if __name__ == "__main__":
    main()
