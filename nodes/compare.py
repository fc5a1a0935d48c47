"""Compare VAEs: one clip or one latent through two VAEs, in pictures and in metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..adapters.checks import check_tensor
from ..serving.memory import room_for
from ..serving.metrics import as_text, compare, difference_picture
from .latent_dict import samples_of
from .schema import LATENT, schema


@dataclass
class Run:
    """What one VAE returned, [T, H, W, 3] in 0..1, and its cost: seconds, and peak GB on CUDA."""

    frames: torch.Tensor
    cost: dict[str, float]


class KVAECompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAECompare",
            display_name="Compare VAEs",
            category=LATENT,
            search_aliases=["psnr", "ssim", "metrics", "vae quality", "side by side"],
            description="Runs two VAEs of any kind on one clip (encode and decode) or on one latent (decode). Compares "
            "the results with the clip; for a latent, with each other.",
            inputs=[
                io.Vae.Input("vae_a", tooltip="The first VAE, on the left."),
                io.Vae.Input("vae_b", tooltip="The second VAE, on the right."),
                io.Image.Input(
                    "pixels",
                    optional=True,
                    tooltip="A clip to encode and decode, cut to 4n + 1 frames and to sides that are multiples of 16.",
                ),
                io.Latent.Input(
                    "samples", optional=True, tooltip="A latent to decode, of a space that both VAEs read."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="side_by_side", tooltip="Each frame: first VAE left, second VAE right."),
                io.Image.Output(
                    display_name="difference",
                    tooltip="Second minus first: grey where they agree, errors enlarged 8 times.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="PSNR, SSIM, flicker, colour bias and seconds; on CUDA also peak memory.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae_a, vae_b, pixels: torch.Tensor | None = None, samples: dict | None = None) -> io.NodeOutput:
        if (pixels is None) == (samples is None):
            raise ValueError("Compare VAEs needs a clip or a latent: connect either pixels or samples.")
        if pixels is not None:
            check_tensor(pixels, "pixels")
            room_for(pixels.shape, "cpu", f"pixels, {list(pixels.shape)}: compare fewer or smaller frames")
            pixels = crop_to_grid(pixels)
        z = None if samples is None else samples_of(samples)
        a, b = (run(vae, pixels, z) for vae in (vae_a, vae_b))
        if pixels is None:
            rows = {"B against A": compare(b.frames, a.frames), "A": a.cost, "B": b.cost}
        else:
            rows = {name: compare(r.frames, pixels) | r.cost for name, r in (("A", a), ("B", b))}
        report = as_text(rows)
        both = torch.cat([a.frames, b.frames], dim=2)
        return io.NodeOutput(both, difference_picture(b.frames, a.frames), report, ui=ui.PreviewText(report))


def crop_to_grid(pixels: torch.Tensor) -> torch.Tensor:
    """[T, H, W, C] cut to 4n + 1 frames, multiples of 16 pixels and RGB, so that no video VAE crops it further."""
    T, H, W, _ = pixels.shape
    return pixels[: 4 * ((T - 1) // 4) + 1, : H - H % 16, : W - W % 16, :3]


def run(vae, pixels: torch.Tensor | None, z: torch.Tensor | None) -> Run:
    """Encode and decode the clip, or decode the latent, with one VAE."""
    cost: dict[str, float] = {}
    if pixels is not None:
        z = _costing(cost, "encode", lambda: vae.encode(pixels))
    frames = _costing(cost, "decode", lambda: vae.decode(z))
    return Run(frames.flatten(0, -4), cost)


def _costing(cost: dict[str, float], name: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of `work`, whose seconds and peak are added to `cost`. A KVAE resets the card's peak."""
    device = comfy.model_management.get_torch_device()
    on_cuda = comfy.model_management.is_device_cuda(device)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = work()
    cost[name] = time.perf_counter() - start
    if on_cuda:
        cost["peak"] = max(cost.pop("peak", 0), torch.cuda.max_memory_allocated(device) / 1e9)
    return result
