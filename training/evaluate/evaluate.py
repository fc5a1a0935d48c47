"""Measure adapters in latents and in pixels, and compare them with the affine map and the pixel path.

    python -m training evaluate --latent-root val_latents --videos-root UCF101 \\
        --adapter-h2k h2k.safetensors --adapter-k2h k2h.safetensors --hunyuan-vae DIR --kvae DIR

Latents: mean squared error of both directions and both cycles, also relative to the variance of the target.
Pixels: PSNR and SSIM against the original, for both VAEs alone and for both decodes through an adapter; PSNR of these
against what the source VAE decodes from the same latent; flicker.
Each adapter is compared with an affine 3x3x3 map fitted in closed form (on --train-latent-root, else on the other half
of these pairs) and with the pixel path: decode with one VAE, encode with the other.
Writes evaluation.txt, evaluation.json, evaluate.json, contact_sheet.png, worst_clips.png and the report (see
`training.evaluate.report`).

    python -m training evaluate --latents generations --adapter-h2k h2k.safetensors --hunyuan-vae DIR --kvae DIR

judges the adapter H→K on latents that a model generated, without any video (see `training.evaluate.generations`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from tqdm import tqdm

from ...adapters.adapter import LatentAdapter
from ...adapters.files import load_adapter
from ...adapters.spaces import LatentSpace
from ...kvae.foreign import json_text
from ...kvae.paths import write_text
from ...serving.metrics import psnr, temporal_error
from ..adapters.closed_form import affine_adapters, fit_both_ways
from ..data.dataset import Pairs, open_pairs, spread
from ..data.manifests import read_manifest, read_spaces, same_vae
from ..directions import DIRECTIONS
from ..errors import UserError
from ..options import write_config
from ..runtime.places import check_apart
from ..runtime.stages import hidden, tell
from ..vaes import VideoVAE, load_hunyuan_vae, load_kvae_for_training, made_with
from .config import EvaluateConfig
from .generations import judge_generations
from .latents import Map, check_channels, latent_metrics
from .originals import check_originals, original_frames
from .pictures import contact_sheet
from .report import REPORT, write_report
from .spectrum import Spectrum
from .tables import plain_text

SHEET_CLIPS = 3
OUTPUTS = (*REPORT, "evaluate.json", "evaluation.json", "evaluation.txt", "contact_sheet.png", "worst_clips.png")
COLUMNS = ["original", "Hunyuan decode", "KVAE decode", "KVAE through H→K", "Hunyuan through K→H"]


def run(config: EvaluateConfig) -> int:
    """Measure, and write the results and the report; return 0, or 1 if generations were skipped.

    Raises:
        UserError: neither or both of --latent-root and --latents are given, or see the functions below.
    """
    if bool(config.latent_root) == bool(config.latents):
        raise UserError("expected --latent-root, a folder of pairs, or --latents, a folder of generated latents")
    if config.latents:
        return judge_generations(config)
    out = Path(config.output_root)
    adapters = {"h2k": Path(config.adapter_h2k), "k2h": Path(config.adapter_k2h)}
    log_file = adapters["h2k"].parent / "train.jsonl"
    check_apart({f"in --output-root, {name}": out / name for name in OUTPUTS}, [*adapters.values(), log_file])
    pairs = open_pairs(config.latent_root).spread(config.max_samples)
    h, k = (each.name for each in read_spaces(config.latent_root))
    h2k = load_adapter(config.adapter_h2k, (h, k), config.device)
    k2h = load_adapter(config.adapter_k2h, (k, h), config.device)
    check_channels(pairs.name(0), pairs[0], h2k)
    chosen = spread(len(pairs), config.num_pixel_samples) if config.videos_root else []
    check_originals(pairs, chosen, config.videos_root)
    vaes = _vaes(config, (h2k, k2h)) if chosen else None
    affine = AffineBaseline(pairs, config)
    result: dict[str, Any] = {"latent": latent_metrics(pairs, h2k, k2h, affine)}
    if vaes:
        result["pixel"] = pixel_metrics(pairs, chosen, Decoding(*vaes, h2k, k2h, affine), config)
    sheets = {"Contact sheet": out / "contact_sheet.png", "The clips that lose most": out / "worst_clips.png"}
    write_report(out, adapters, result, log_file, sheets if config.videos_root else {})
    write_config(out / "evaluate.json", "evaluate", config)
    write_text(out / "evaluation.json", json_text(result, indent=2) + "\n")
    text = plain_text(result)
    write_text(out / "evaluation.txt", text)
    print(text, end="")
    print(f"→ {out}")
    return 0


class AffineBaseline:
    """Closed-form affine 3x3x3 maps, never applied to pairs they were fitted to.

    They are fitted to --train-latent-root, if given; else to each half of the pairs, and applied to the other half.

    Raises:
        UserError: the pairs are too few, or are of one video.
    """

    def __init__(self, pairs: Pairs, config: EvaluateConfig):
        spaces = read_spaces(config.latent_root)
        if config.train_latent_root:
            self.second = np.zeros(len(pairs), dtype=bool)
            self.maps = [_maps(open_pairs(config.train_latent_root), spaces, config.device)] * 2
        else:
            try:
                self.second = pairs.halves()
            except UserError as error:
                raise UserError(f"{config.latent_root}: {error}: give --train-latent-root") from None
            self.maps = [_maps(pairs.take(half), spaces, config.device) for half in (self.second, ~self.second)]

    def __call__(self, i: int, direction: str) -> Map:
        """The map of a direction ("h2k" or "k2h") for pair i."""
        return self.maps[int(self.second[i])][direction]


def _maps(pairs: Pairs, spaces: tuple[LatentSpace, LatentSpace], device: str) -> dict[str, Map]:
    fits = fit_both_ways(pairs, device)
    try:
        return {name: each.to(device).eval() for name, each in affine_adapters(fits, spaces).items()}
    except ValueError as error:
        raise UserError(f"no affine baseline: {error}, or give --train-latent-root") from None


@dataclass(frozen=True)
class Decoding:
    """The ways from a clip's latents to pixels that `evaluate` measures."""

    hunyuan: VideoVAE
    kvae: VideoVAE
    h2k: LatentAdapter
    k2h: LatentAdapter
    affine: Callable[[int, str], Map]

    def decodes(self, i: int, z_h: Tensor, z_k: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By way, for pair i: its decode and the source VAE's own decode, both [1, 3, T, H, W] in 0..255."""
        hunyuan, kvae = self.hunyuan, self.kvae
        y_h, y_k = hunyuan.decode(z_h), kvae.decode(z_k)
        return {
            "Hunyuan": (y_h, y_h),
            "KVAE": (y_k, y_k),
            "KVAE(H→K)": (kvae.decode(self.h2k(z_h)), y_h),
            "KVAE(affine H→K)": (kvae.decode(self.affine(i, "h2k")(z_h)), y_h),
            "KVAE(pixel path)": (kvae.decode(kvae.encode(y_h.round().byte())), y_h),
            "Hunyuan(K→H)": (hunyuan.decode(self.k2h(z_k)), y_k),
            "Hunyuan(affine K→H)": (hunyuan.decode(self.affine(i, "k2h")(z_k)), y_k),
            "Hunyuan(pixel path)": (hunyuan.decode(hunyuan.encode(y_k.round().byte())), y_k),
        }


@torch.inference_mode()
def pixel_metrics(pairs: Pairs, chosen: list[int], decoding: Decoding, config: EvaluateConfig) -> dict:
    """Measure PSNR, SSIM and flicker of every decode, averaged over clips, and find the clips that lose most.

    Two contact sheets are written on the way: of some clips, and of the clips that lose most by an adapter.

    Returns:
        clips: their number.
        figures: the means, by decode.
        worst: the clips that lose most PSNR by an adapter, with that loss in dB.
        spectrum: by adapter, squared difference to the source VAE's decode by spatial frequency, see `Spectrum`.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    spectra = {f"{each.decoder}({each.arrow})": Spectrum() for each in DIRECTIONS.values()}
    sheet, sheet_at = [], set(spread(len(chosen), SHEET_CLIPS))
    worst: list[tuple[float, str, list[Tensor]]] = []
    for n, i in enumerate(tqdm(chosen, desc="pixels", unit="clip", leave=False, disable=hidden())):
        tell(n / len(chosen))
        original = original_frames(pairs.name(i), pairs[i], config.videos_root)
        decodes = decoding.decodes(i, *pairs.batch([i], torch.device(config.device)))
        for name, (decoded, direct) in decodes.items():
            rows.setdefault(name, []).append(_compare(decoded.cpu(), direct.cpu(), original, decoded is direct))
            if name in spectra:
                spectra[name].add(decoded - direct, direct)
        columns = ("Hunyuan", "KVAE", "KVAE(H→K)", "Hunyuan(K→H)")
        videos = [original, *(decodes[name][0][0, :, : original.shape[1]].cpu().round().byte() for name in columns)]
        if n in sheet_at:
            sheet.append(videos)
        psnrs = {name: each[-1]["psnr"] for name, each in rows.items()}
        lost = max(psnrs[each.decoder] - psnrs[f"{each.decoder}({each.arrow})"] for each in DIRECTIONS.values())
        worst = sorted([*worst, (lost, pairs.name(i), videos)], key=lambda each: -each[0])[:SHEET_CLIPS]
    out = Path(config.output_root)
    contact_sheet(out / "contact_sheet.png", COLUMNS, sheet)
    contact_sheet(out / "worst_clips.png", COLUMNS, [videos for _, _, videos in worst])
    means = {name: {key: sum(row[key] for row in each) / len(each) for key in each[0]} for name, each in rows.items()}
    lost_most = [{"clip": name, "lost": lost} for lost, name, _ in worst]
    shares = {name: each.shares() for name, each in spectra.items()}
    return {"clips": len(chosen), "figures": means, "worst": lost_most, "spectrum": shares}


def _compare(decoded: Tensor, direct: Tensor, original: Tensor, same: bool) -> dict[str, float]:
    frames = original.shape[1]
    y, x = decoded[0, :, :frames], original.float()
    metrics = {
        "psnr": psnr(y, x),
        "ssim": ssim(y.movedim(1, 0), x.movedim(1, 0), data_range=255.0).item(),  # type: ignore[union-attr]
        "flicker": temporal_error(y, x),
    }
    return metrics if same else metrics | {"psnr_source": psnr(y, direct[0, :, :frames])}


def _vaes(config: EvaluateConfig, adapters: tuple[LatentAdapter, LatentAdapter]) -> tuple[VideoVAE, VideoVAE]:
    """Load both VAEs; refuse VAEs other than those that made the pairs and the adapters.

    Raises:
        UserError: the pairs were made with other VAEs.
        WeightsError: the adapters were made for other VAEs.
    """
    hunyuan = load_hunyuan_vae(config.hunyuan_vae, config.device)
    kvae = load_kvae_for_training(config.kvae, config.device)
    manifest = read_manifest(config.latent_root)
    for key, vae in (("hunyuan_vae", hunyuan), ("kvae", kvae)):
        if manifest and not same_vae(manifest[key], made_with(vae)):
            raise UserError(
                f"{config.latent_root}: its pairs were made with another {key} than {vae.source}; "
                f"give the same --{key.replace('_', '-')}"
            )
        for adapter in adapters:
            adapter.check_fits(vae.space.name, vae.signature)
    return hunyuan, kvae
