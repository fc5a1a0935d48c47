"""Encode and decode one video with one VAE: PSNR, and original and reconstruction side by side.

    python -m training reconstruct --video-path clip.mp4 --vae kvae --kvae DIR

The picture is cropped to the proportions of --height and --width. Frames keep their times.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...serving.fit import CROP
from ...serving.metrics import psnr, temporal_error
from ...serving.video_writer import write_video
from ..data.videos import MIN_FRAMES, Clip, read_clip, times_of
from ..errors import UserError
from ..options import DEVICE, HUNYUAN_HELP, KVAE_HELP, MOST_FRAMES, MOST_SIDE, check_values, option, write_config
from ..runtime.places import check_apart, check_target
from ..vaes import VideoVAE, load_hunyuan_vae, load_kvae_for_training
from .pictures import side_by_side


@dataclass
class ReconstructConfig:
    video_path: str = option(..., "video to read")
    vae: str = option("kvae", "the VAE to use", choices=("kvae", "hunyuan"))
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP, metavar="VAE")
    kvae: str = option("tiny", KVAE_HELP, metavar="VAE")
    output: str = option("reconstruction.mp4", "side-by-side video to write", writes="file")
    num_frames: int = option(33, "number of frames, from the start", least=MIN_FRAMES, most=MOST_FRAMES)
    height: int = option(240, "height in pixels, a multiple of 8 or 16, as the VAE needs", least=16, most=MOST_SIDE)
    width: int = option(320, "width in pixels, a multiple of 8 or 16, as the VAE needs", least=16, most=MOST_SIDE)
    device: str = option(DEVICE, "device of the VAE", metavar="DEVICE")


def run(config: ReconstructConfig) -> int:
    """Encode and decode one video, and write both side by side; return 0."""
    out = Path(config.output)
    _check(config, out)
    vae: VideoVAE
    if config.vae == "kvae":
        vae = load_kvae_for_training(config.kvae, config.device)
    else:
        vae = load_hunyuan_vae(config.hunyuan_vae, config.device)
    side = vae.space.spatial_factor
    if config.height % side or config.width % side:
        raise UserError(f"{config.height}x{config.width}: expected multiples of {side} ({vae.space.name})")
    clip = Clip(Path(config.video_path), config.num_frames, 0)
    frames = read_clip(clip, config.height, config.width, CROP)
    decoded = _through(vae, frames)
    x = frames.float()
    print(f"{frames.shape[1]} frames: PSNR {psnr(decoded, x):.2f} dB, flicker {temporal_error(decoded, x):.2f}")
    write_video(out, side_by_side(["original", config.vae], [frames, decoded.round().byte()]), times_of(clip))
    write_config(out.with_suffix(".json"), "reconstruct", config)
    print(f"→ {out}")
    return 0


def _through(vae: VideoVAE, frames: Tensor) -> Tensor:
    """Encode and decode frames, uint8 [3, T, H, W]; return float32 of that shape, in 0..255."""
    return vae.decode(vae.encode(frames[None]))[0, :, : frames.shape[1]].cpu()


def _check(config: ReconstructConfig, out: Path) -> None:
    check_values(config)
    if out.suffix != ".mp4":
        raise UserError(f"--output is {out}; expected a name that ends in .mp4")
    settings = out.with_suffix(".json")
    check_target("next to --output,", settings)
    check_apart({"--output": out, "the file of its settings": settings}, [Path(config.video_path)])
