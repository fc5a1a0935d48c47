"""The adapter H→K on latents that a model generated: what its own VAE decodes, beside what KVAE decodes.

    python -m training evaluate --latents generations --adapter-h2k h2k.safetensors --hunyuan-vae DIR --kvae DIR

There is no original to compare with, so the decode of the model's own VAE is the reference: PSNR, SSIM, flicker,
sharpness and colour say what KVAE with the adapter changes. KVAE's frames are compared as they are decoded. A file that
cannot be used is named, and the others are judged.

# x HunyuanVideo's decode, y KVAE's; x_3THW and y_3HW in 0..1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import LatentAdapter
from ...adapters.checks import latent_kind
from ...adapters.files import load_adapter
from ...adapters.spaces import fitting_spaces
from ...adapters.weights import check_latent_weights
from ...kvae.foreign import json_text
from ...kvae.paths import write_text
from ...serving.clips import frames_to_keep
from ...serving.host_vae import HostVAE, to_image
from ...serving.latent_files import LatentFile
from ...serving.metrics import PEAK, Comparison, difference_picture, psnr_of
from ..data.dataset import spread
from ..errors import UserError
from ..latents.bulk import Bulk, Progress
from ..latents.options import ENDINGS, read
from ..latents.sources import find_sources
from ..options import write_config
from ..runtime.places import check_apart
from ..vaes import HunyuanVAE, load_hunyuan_vae, load_kvae_for_training
from .config import EvaluateConfig
from .generations_report import plain_text, write_report
from .pictures import contact_sheet
from .spectrum import Spectrum

SHEET_CLIPS = 3  # on the contact sheet, each with three frames
WORST_FRAMES = 6  # of as many clips
COLUMNS = ["Hunyuan decode", "KVAE through H→K", "difference × 8"]
SHEETS = {"Contact sheet": "contact_sheet.png", "The frames that differ most": "worst_frames.png"}
OUTPUTS = ("evaluate.json", "evaluation.json", "evaluation.txt", "report.html", "report.json", *SHEETS.values())


@dataclass
class Judged:
    """What was found. Pictures are uint8 [3, T, H, W]: x, y and their difference.

    Attributes:
        clips: name and metrics of each clip; see `compare_clip`.
        sheet: of some clips, three frames.
        worst: of the clips whose worst frames have the lowest PSNR, these frames: the PSNR, the clip, the frame's
            number, and the pictures.
        spectrum: of the differences, and of x.
    """

    clips: list[dict[str, Any]] = field(default_factory=list)
    sheet: list[list[Tensor]] = field(default_factory=list)
    worst: list[tuple[float, str, int, list[Tensor]]] = field(default_factory=list)
    spectrum: Spectrum = field(default_factory=Spectrum)

    def result(self) -> dict[str, Any]:
        """As in evaluation.json: means over clips, figures of each clip, the worst frames, errors by frequency."""
        keys = [key for key in self.clips[0] if key != "clip"]
        means = {key: sum(clip[key] for clip in self.clips) / len(self.clips) for key in keys}
        worst = [{"clip": name, "frame": t, "psnr_source": psnr} for psnr, name, t, _ in self.worst]
        return {"figures": means, "clips": self.clips, "worst": worst, "spectrum": self.spectrum.shares()}


@torch.inference_mode()
def judge_generations(config: EvaluateConfig) -> int:
    """Judge all latents below --latents; return 0, or 1 if some were skipped.

    Raises:
        UserError: there are no latents, or none could be judged.
        WeightsError: a VAE or the adapter cannot be read, or they do not fit each other.
    """
    out, adapter_file = Path(config.output_root), Path(config.adapter_h2k)
    check_apart({f"in --output-root, {name}": out / name for name in OUTPUTS}, [adapter_file])
    sources = find_sources([config.latents], ENDINGS)
    sources = [sources[i] for i in spread(len(sources), config.num_pixel_samples)]
    decoders, judged, bulk = Decoders(config), Judged(), Bulk("judged", len(sources))
    sheet_at = set(spread(len(sources), SHEET_CLIPS))
    with Progress("generations", [1] * len(sources)) as progress:
        for n, source in enumerate(sources):
            done = progress.of_file(1)
            with bulk.file(source.path):
                for name, x, y in decoders.clips(source.path, source.name, config):
                    judge_clip(judged, name, x, y, on_sheet=n in sheet_at)
            done(1, 1)
    code = bulk.code()
    result = judged.result()
    contact_sheet(out / SHEETS["Contact sheet"], COLUMNS, judged.sheet)
    worst = [pictures for *_, pictures in judged.worst]
    contact_sheet(out / SHEETS["The frames that differ most"], COLUMNS, worst, frames=1)
    write_report(out, adapter_file, result, {title: out / name for title, name in SHEETS.items()})
    write_config(out / "evaluate.json", "evaluate", config)
    write_text(out / "evaluation.json", json_text(result, indent=2) + "\n")
    text = plain_text(result)
    write_text(out / "evaluation.txt", text)
    print(f"{text}→ {out}")
    return code


class Decoders:
    """HunyuanVideo's VAE, and a KVAE with the adapter.

    Raises:
        WeightsError: one of them cannot be read, or they do not fit each other.
    """

    def __init__(self, config: EvaluateConfig):
        self.device = config.device
        self.hunyuan: HunyuanVAE = load_hunyuan_vae(config.hunyuan_vae, config.device)
        kvae = load_kvae_for_training(config.kvae, config.device)
        direction = self.hunyuan.space.name, kvae.space.name
        self.adapter: LatentAdapter = load_adapter(config.adapter_h2k, direction, config.device)
        self.adapter.check_fits(direction[0], self.hunyuan.signature)
        self.host = HostVAE(kvae.kvae, self.adapter)

    def clips(self, path: Path, name: str, config: EvaluateConfig) -> Iterator[tuple[str, Tensor, Iterator[Tensor]]]:
        """For each clip of a file: its name, x_3THW, and the frames y_3HW as they are decoded.

        Raises:
            UserError, WeightsError, ValueError: the file cannot be read, or its latents are of another space or VAE.
        """
        found = read(path, config)
        self.check(path, found)
        clips, _, decoded, _, _ = self.host.decode_output_shape(found.z.shape)
        kept = frames_to_keep(decoded, found.frames, self.adapter.source.temporal_factor)
        for i, z in enumerate(found.z.to(self.device, torch.float32).split(1)):
            x = self.hunyuan.decode(z)[0, :, :kept].cpu() / PEAK
            y = (frame for frames in self.host.decode_stream(z) for frame in to_image(frames)[0].unbind(1))
            yield name if clips == 1 else f"{name}.{i:03d}", x, y

    def check(self, path: Path, found: LatentFile) -> None:
        """Refuse latents that the adapter does not read. A file that names no space is taken for one of the adapter's.

        Raises:
            UserError, ValueError: they are of another space, or of another VAE.
        """
        space = self.adapter.source
        if found.space not in (None, space.name):
            raise UserError(f"{path}: this is a latent of {found.space}; the adapter reads those of {space.name}")
        if space not in fitting_spaces(found.z.shape):
            raise ValueError(f"{path}: this is {latent_kind(found.z.shape)}; expected one of {space.name}")
        check_latent_weights(space.name, found.weights, self.adapter.weights.get(space.name))


def judge_clip(judged: Judged, name: str, x_3THW: Tensor, y_frames: Iterable[Tensor], on_sheet: bool) -> None:
    """Compare a clip, and keep what the report shows of it. Frames of y after the last one of x do not count.

    Raises:
        ValueError: a frame is not finite.
    """
    comparison, steepness = Comparison(), torch.zeros(2).double()
    T = x_3THW.shape[1]
    shown: dict[int, list[Tensor]] = {}
    lowest, worst = math.inf, (0, [torch.empty(0)])
    for t, (x, y) in enumerate(zip(x_3THW.unbind(1), y_frames, strict=False)):
        psnr = psnr_of(comparison.add(y.movedim(0, -1), x.movedim(0, -1)))
        if not math.isfinite(psnr):
            raise ValueError(f"frame {t} decodes to values that are not finite numbers")
        steepness += torch.stack([_steepness(y), _steepness(x)])
        judged.spectrum.add((y.cpu() - x)[:, None], x[:, None])
        if on_sheet and t in (0, (T - 1) // 2, T - 1):
            shown[t] = _pictures(x, y)
        if psnr < lowest:
            lowest, worst = psnr, (t, _pictures(x, y))
    metrics = comparison.metrics()
    sharp_y, sharp_x = steepness.clamp(min=1e-12).sqrt().tolist()
    judged.clips.append(
        {"clip": name, "psnr_source": metrics.pop("psnr"), **metrics, "sharpness": sharp_y / sharp_x, "frames": T}
    )
    judged.worst = sorted([*judged.worst, (lowest, name, *worst)], key=lambda each: each[0])[:WORST_FRAMES]
    if shown:
        judged.sheet.append([torch.cat(videos, 1) for videos in zip(*shown.values(), strict=True)])


def _steepness(x_3HW: Tensor) -> Tensor:
    """Mean square of the differences between neighbouring rows and columns."""
    return (x_3HW.diff(dim=1).square().mean() + x_3HW.diff(dim=2).square().mean()).double().cpu()


def _pictures(x_3HW: Tensor, y_3HW: Tensor) -> list[Tensor]:
    """The frame of both, and their difference, uint8 [3, 1, H, W] each."""
    y = y_3HW.cpu()
    return [(PEAK * each).round().byte()[:, None] for each in (x_3HW, y, difference_picture(y, x_3HW))]
