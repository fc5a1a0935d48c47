"""One video through one VAE: PSNR, and original and reconstruction side by side.

python -m training reconstruct --video-path clip.mp4 --vae kvae --kvae DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .evaluate import flicker, psnr
from .options import DEVICE, HUNYUAN_HELP, KVAE_HELP, option, write_config
from .pictures import side_by_side
from .vaes import load_hunyuan_vae, load_kandinsky_vae
from .videos import Clip, frame_rate, read_clip, write_video


@dataclass
class ReconstructConfig:
    video_path: str = option(..., "the video")
    vae: str = option("kvae", "which VAE", choices=("kvae", "hunyuan"))
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP)
    kvae: str = option("tiny", KVAE_HELP)
    output: str = option("reconstruction.mp4", "side-by-side video to write")
    num_frames: int = option(33, "frames to take, from the start")
    height: int = option(240, "pixels, a multiple of 8 or 16, as the VAE needs")
    width: int = option(320, "pixels, a multiple of 8 or 16, as the VAE needs")
    device: str = option(DEVICE, "device of the VAE")


def run(config: ReconstructConfig) -> int:
    """Encode and decode; returns 0."""
    out = Path(config.output)
    if out.suffix != ".mp4":
        raise UserError(f"--output is {out}; expected a name that ends in .mp4")
    video = Path(config.video_path)
    load, name = (load_kandinsky_vae, config.kvae) if config.vae == "kvae" else (load_hunyuan_vae, config.hunyuan_vae)
    vae = load(name, config.device)
    if config.height % vae.space.space or config.width % vae.space.space:
        raise UserError(f"{config.height}x{config.width}: expected multiples of {vae.space.space} ({vae.space.name})")
    frames = read_clip(Clip(video, config.num_frames, 0), config.height, config.width)
    decoded = vae.decode(vae.encode(frames[None]))[0, :, : frames.shape[1]].cpu()
    x = frames.float()
    print(f"{frames.shape[1]} frames: PSNR {psnr(decoded, x):.2f} dB, flicker {flicker(decoded, x):.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_video(out, side_by_side(["original", config.vae], [frames, decoded.round().byte()]), frame_rate(video))
    write_config(out.with_suffix(".json"), "reconstruct", config)
    print(f"→ {out}")
    return 0
