"""Extraction beside the one-clip-at-a-time way with the same VAEs: seconds, interleaved in one run.

    python -m benchmarks.extraction --videos-root UCF101 --clips 24
    python -m benchmarks.extraction --videos-root VIDEOS --clips 24 --clips-per-video 8

The plain way, as the published pairs were made: for each clip decode the video, cut and resize, encode with one VAE and
with the other, compress, write; then the next. Both sides run on one thread a library (PyTorch's and the decoder's),
take the same windows and make the same pairs, which is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import torch

from kvae_comfyui.training import extract
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.pairs import SUFFIX, Pair, Source, find_pairs, read_pair, write_pair
from kvae_comfyui.training.vaes import VideoVAE, load_hunyuan_vae, load_kandinsky_vae
from kvae_comfyui.training.videos import cut, find_videos, read_clip


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos-root", required=True)
    parser.add_argument("--clips", type=int, default=16, help="clips a round (default 16)")
    parser.add_argument("--clips-per-video", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="interleaved runs of each side (default 2)")
    parser.add_argument("--hunyuan-vae", default="tiny")
    parser.add_argument("--kvae", default="tiny")
    parser.add_argument("--size", default="33x128x128", help="FRAMESxHEIGHTxWIDTH (default 33x128x128)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    frames, height, width = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        config = extract.ExtractConfig(
            videos_root=options.videos_root,
            output_root="",
            hunyuan_vae=options.hunyuan_vae,
            kvae=options.kvae,
            max_clips=options.clips,
            clips_per_video=options.clips_per_video,
            num_frames=frames,
            height=height,
            width=width,
            batch_size=options.batch_size,
            device=options.device,
        )
        vaes = load_hunyuan_vae(config.hunyuan_vae, config.device), load_kandinsky_vae(config.kvae, config.device)
        seconds: dict[str, list[float]] = {"one at a time": [], "extract": []}
        for n in range(options.rounds):
            for name in seconds:
                config.output_root = os.path.join(folder, f"{name} {n}")
                start = time.perf_counter()
                if name == "extract":
                    with contextlib.redirect_stdout(io.StringIO()):
                        extract.run(config)
                else:
                    one_at_a_time(config, *vaes)
                seconds[name].append(time.perf_counter() - start)
                print(f"round {n + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
            check_same(Path(folder, f"one at a time {n}"), Path(folder, f"extract {n}"))
    plain, ours = (min(each) for each in seconds.values())
    print(f"{options.clips} clips of {options.size}, best of {options.rounds}: {plain:.1f} s → {ours:.1f} s")
    print(f"ratio {plain / ours:.2f} (extract also loads both VAEs within its time)")


def one_at_a_time(config: extract.ExtractConfig, hunyuan: VideoVAE, kvae: VideoVAE) -> None:
    """The plain loop: nothing overlaps, and every window decodes its video from the start."""
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
    """Both made the same pairs, to the last bits of fp16."""
    one, other = ([path.relative_to(root) for path in find_pairs(root)] for root in (plain, ours))
    if one != other:
        raise SystemExit(f"{len(one)} and {len(other)} pairs, of other names")
    for path in one:
        a, b = read_pair(plain / path), read_pair(ours / path)
        for x, y in ((a.z_h, b.z_h), (a.z_k, b.z_k)):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


if __name__ == "__main__":
    main()
