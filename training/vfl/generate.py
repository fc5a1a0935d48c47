"""Generate videos with a LoRA of HunyuanVideo 1.5 and without it, side by side, from the same picture and noise.

    python -m training vfl-generate ash.png gary.png --prompt "A boy waves at the camera." \\
        --base hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v --lora ash/step-1000/ash-1000.comfyui.safetensors \\
        --output-root videos

LORA is a file of ComfyUI, diffusers or musubi-tuner, or the folder of an adapter of peft. videos/index.html shows all
videos, how much they move and, with --head and --backbone, how much they show the character. It runs in diffusers'
pipeline; on a GPU, one part of it at a time is there. The same command continues after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...kvae.errors import WeightsError
from ...kvae.foreign import json_text, parse_object
from ...kvae.paths import file_errors, read_text, sha256_of, write_text
from ...serving.dtypes import DTYPES
from ...serving.video_writer import FASTEST, SLOWEST, write_video
from ..errors import UserError, printable
from ..evaluate.pictures import side_by_side
from ..options import DEVICE, KVAE_HELP, MOST_SEED, argument, option
from ..runtime.places import shareable
from ..served import AUTO, ServedOptions, load_served
from .backbone import load_backbone
from .base import load_whole
from .decoders import SPACE
from .generate_report import write_report
from .head_files import load_head
from .identity import Embedder
from .lora import base_of, put_lora
from .lora_reading import lora_file, read_lora
from .pictures import PictureError, bucket, cropped, read_picture

MOST_FRAMES = 1001
FRAMES = 8  # that are judged at a time
Decoder = Callable[[Tensor], Tensor]  # z_1cthw scaled latents → uint8 [3, T, H, W]


@dataclass
class VflGenerateConfig:
    pictures: list[str] = argument("first frames", "PICTURE")  # noqa: RUF009
    base: str = option(..., "image-to-video pipeline of HunyuanVideo 1.5: folder or hub id", metavar="MODEL")
    lora: str = option(..., "LoRA of any of four formats: a file, or the folder of an adapter of peft")
    prompt: str = option(..., "what happens", metavar="TEXT")
    output_root: str = option(..., "folder for the videos and the page", writes="folder")
    frames: int = option(121, "frames of a video, a multiple of 4 and one more", least=5, most=MOST_FRAMES)
    steps: int = option(50, "steps from noise to a video", least=1, most=1000)
    fps: float = option(24.0, "frames per second", least=float(SLOWEST), most=FASTEST)
    kvae: str = option("", f"{KVAE_HELP}; decodes in the place of the pipeline's VAE", metavar="VAE")
    adapter_h2k: str = option("", "adapter hunyuan_video_1.5 → that KVAE's latents")
    head: str = option("", "identity head, by which the page says how much a video shows the character of its picture")
    backbone: str = option("", "DINOv3 ViT of that head: folder or hub id", metavar="MODEL")
    seed: int = option(0, "seed of the noise", least=0, most=MOST_SEED)
    dtype: str = option(AUTO, "precision; auto is bf16 on a GPU, else fp32", choices=(AUTO, *DTYPES))
    device: str = option(DEVICE, "device to generate on", metavar="DEVICE")


@dataclass(frozen=True)
class Task:
    """A picture, what its video is made of, and the names of its files."""

    picture: Tensor  # uint8 [3, H, W]
    made_of: str
    video: Path
    record: Path


def run(config: VflGenerateConfig) -> int:
    """Generate the videos that are missing, and write the page; return 0, or 1 if some pictures could not be read.

    Raises:
        UserError: an option, the base, the LoRA or the head cannot be used, or a video of something else is there.
        WeightsError: a file cannot be read or written.
    """
    check_config(config)
    tasks, skipped = _tasks(config)
    left = [task for task in tasks if not _is_there(task)]
    if left:
        stage = Stage(config)
        for task in left:
            figures = stage.play(task)
            write_text(task.record, json_text({"made_of": task.made_of, "figures": figures}, indent=1) + "\n")
            print(f"{printable(str(task.video))}: {_line(figures)}", flush=True)
    for line in skipped:
        print(printable(f"skipped: {line}"), file=sys.stderr)
    if tasks:
        found = {task.video.name: parse_object(read_text(task.record))["figures"] for task in tasks}
        page = write_report(Path(config.output_root), shareable(config), sha256_of(lora_file(Path(config.lora))), found)
        print(f"{len(left)} of {len(tasks)} videos generated, the others were there → {printable(str(page))}")
    return 1 if skipped else 0


def check_config(config: VflGenerateConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: names them.
    """
    if config.frames % 4 != 1:
        raise UserError(f"--frames is {config.frames}; expected a multiple of 4 and one more, as 17 or 121")
    if bool(config.head) != bool(config.backbone):
        raise UserError("--head and --backbone go together; give both, or neither")
    if config.adapter_h2k and not config.kvae:
        raise UserError("--adapter-h2k is for --kvae, which is missing")


def _tasks(config: VflGenerateConfig) -> tuple[list[Task], list[str]]:
    """The pictures that can be read, and the others."""
    settings = shareable(config) | {"pictures": [], "output_root": "", "device": "", "lora": ""}
    lora, tasks, skipped = sha256_of(lora_file(Path(config.lora))), dict[str, Task](), list[str]()
    for name in config.pictures:
        path = Path(name)
        with file_errors(path):
            data = path.read_bytes()
        if path.stem in tasks:
            raise UserError(f"{name}: another picture is called {path.stem}, too; rename one of them")
        try:
            picture = read_picture(data)
        except PictureError as error:
            skipped.append(f"{name}: {error}")
            continue
        made_of = json.dumps(settings | {"picture": hashlib.sha256(data).hexdigest(), "lora": lora})
        root = Path(config.output_root)
        tasks[path.stem] = Task(picture, made_of, root / f"{path.stem}.mp4", root / f"{path.stem}.json")
    return list(tasks.values()), skipped


def _is_there(task: Task) -> bool:
    """Whether the video is there, made of the same.

    Raises:
        UserError: one of something else has its name.
    """
    if not task.record.exists() and not task.video.exists():
        return False
    try:
        same = parse_object(read_text(task.record)).get("made_of") == task.made_of
    except (ValueError, WeightsError):
        same = False
    if not same:
        raise UserError(
            f"{task.video}: there already, and not made of this picture, LoRA and settings; delete it and "
            f"{task.record.name}, or choose another --output-root"
        )
    return task.video.exists()


class Stage:
    """The pipeline with the LoRA in it, and what the videos are judged by.

    Raises:
        UserError, WeightsError: as `run`.
    """

    def __init__(self, config: VflGenerateConfig):
        self.config, self.device = config, torch.device(config.device)
        lora, self.judge = read_lora(Path(config.lora)), _judge(config)
        print(f"{printable(config.lora)}: {lora.about()}")
        dtype = DTYPES[config.dtype] if config.dtype != AUTO else _usual(self.device)
        self.decode: Decoder | None = _kvae(config) if config.kvae else None
        self.pipe = load_whole(config.base, dtype)
        put_lora(self.pipe.transformer, lora.layers)
        if self.device.type == "cuda":
            self.pipe.enable_model_cpu_offload(device=self.device)
        else:
            self.pipe.to(self.device)
        self.pipe.vae.enable_tiling()  # whole, 121 frames are the largest part of all

    @torch.no_grad()
    def play(self, task: Task) -> dict[str, float]:
        """Write the video of a picture, and return its figures: motion in levels of 255 and, with a head, cosines."""
        height, width = task.picture.shape[1:]
        size = bucket(height, width, self.pipe.transformer.config.target_size)
        picture = cropped(task.picture, None, size)
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        with base_of(self.pipe.transformer):
            base = self._video(image, "base")
        ours = self._video(image, "LoRA")
        write_video(task.video, side_by_side(["base", "LoRA"], [base, ours]), self.config.fps)
        found = {"base_motion": _motion(base), "motion": _motion(ours)}
        if self.judge:
            found |= {"base_identity": self._identity(base, picture), "identity": self._identity(ours, picture)}
        return found

    def _video(self, image: Image.Image, name: str) -> Tensor:
        """Frames, uint8 [3, T, H, W]."""
        self.pipe.set_progress_bar_config(desc=name, disable=None, leave=False)
        made = torch.Generator().manual_seed(self.config.seed)
        options = {"num_frames": self.config.frames, "num_inference_steps": self.config.steps, "output_type": "latent"}
        z_1cthw = SPACE.unscale(self.pipe(image, self.config.prompt, generator=made, **options).frames)
        x = self.decode(z_1cthw) if self.decode else self.pipe.vae.decode(z_1cthw.to(self.pipe.vae.dtype)).sample
        return ((x[0].float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()

    def _identity(self, video_3THW: Tensor, picture_3HW: Tensor) -> float:
        """The mean cosine of the frames after the first with the picture."""
        assert self.judge
        frames, anchor = video_3THW[:, 1:].transpose(0, 1), self.judge(picture_3HW[None].to(self.device) / 255)
        cosines = [self.judge(part.to(self.device) / 255) @ anchor[0] for part in frames.split(FRAMES)]
        return torch.cat(cosines).mean().item()


def _judge(config: VflGenerateConfig) -> Embedder | None:
    if not config.head:
        return None
    backbone = load_backbone(config.backbone, config.device)
    return Embedder(backbone, load_head(Path(config.head), backbone)[0]).to(config.device)


def _kvae(config: VflGenerateConfig) -> Decoder:
    options = ServedOptions(config.kvae, config.adapter_h2k, dtype=config.dtype, device=config.device)
    host = load_served(options, SPACE.name, ("decode",))
    return lambda z_1cthw: host.decode(z_1cthw.to(config.device))


def _usual(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _motion(video_3THW: Tensor) -> float:
    """The mean change from frame to frame, in levels of 255."""
    return video_3THW.float().diff(dim=1).abs().mean().item()


def _line(figures: dict[str, Any]) -> str:
    said = f"motion {figures['motion']:.2f}, base {figures['base_motion']:.2f}"
    if "identity" in figures:
        said += f"; identity {figures['identity']:.3f}, base {figures['base_identity']:.3f}"
    return said
