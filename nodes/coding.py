"""KVAE Decode and KVAE Encode: VAE Decode and VAE Encode, with what only this pack knows of a latent."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io

from ..adapters.checks import check_finite, check_shape, check_tensor
from ..adapters.weights import check_latent_weights
from ..serving.clips import check_replaceable, frames_to_keep, pad_clip
from ..serving.memory import room_for
from .latent_dict import FRAMES, WEIGHTS, described, parts_of, samples_of, space_of, weights_of
from .schema import LATENT, advanced, schema
from .vae import ComfyVAE

RAW, SCALED = "raw", "scaled"


class KVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAEDecode",
            display_name="KVAE Decode",
            category=LATENT,
            search_aliases=["vae decode", "tiled", "latent to video", "hunyuan decode", "kandinsky decode"],
            description="Decodes a video latent with a VAE from Load KVAE. In addition to what VAE Decode does, it "
            "checks that the latent belongs to the VAE's space, accepts latents from wrapper packs, decodes the video "
            "part of a latent with audio, and returns exactly the frames that KVAE Encode got.",
            inputs=[
                *latent_inputs(),
                advanced(
                    io.Boolean.Input,
                    "approximate",
                    default=False,
                    tooltip="Used only if nothing exact fits. Off: the exact way that needs least memory, or an error "
                    "if memory_gb is too small. On: blended tiles; far less memory, faster, about 43 dB PSNR against "
                    "the exact frames.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The frames: the clips of a batch, one after the other.")],
        )

    @classmethod
    def execute(
        cls, samples: dict, vae: ComfyVAE, scaling: str, memory_gb: float, approximate: bool = False
    ) -> io.NodeOutput:
        vae, z = decoder_and_latent(vae, samples, scaling, memory_gb, approximate)
        frames = vae.decode(z)
        return io.NodeOutput(frames[:, : frames_to_keep(frames.shape[1], samples.get(FRAMES))].flatten(0, 1))


class KVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAEEncode",
            display_name="KVAE Encode",
            category=LATENT,
            search_aliases=["vae encode", "video to latent", "image to latent", "image to video"],
            description="Encodes a clip with a VAE from Load KVAE. In addition to what VAE Encode does, it keeps every "
            "frame, by repeating the last one up to the next 4n + 1, and writes into the latent which space and VAE it "
            "is of. It can also put the clip into a latent with audio.",
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="The frames of one clip. Sides are cropped to a multiple of 8 (of 16 for KVAE 2.0-t4s16).",
                ),
                io.Vae.Input("vae", tooltip="From Load KVAE."),
                io.Latent.Input(
                    "samples",
                    optional=True,
                    tooltip="A latent whose video is replaced by the clip's, of the same length and size. Its audio, "
                    "noise mask and batch numbers stay.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latent of the clip: raw, as ComfyUI's samplers expect it.")],
        )

    @classmethod
    def execute(cls, pixels: torch.Tensor, vae: ComfyVAE, samples: dict | None = None) -> io.NodeOutput:
        check_vae(vae)
        check_tensor(pixels, "pixels")
        room_for(pixels.shape, "cpu", f"pixels, {list(pixels.shape)}: encode fewer or smaller frames")
        clip, space = pad_clip(pixels, vae.kvae_space.temporal_factor), vae.kvae_space
        others: list[torch.Tensor] = []
        if samples is not None:
            old, *others = parts_of(samples)
            check_shape(old.shape, space, space_of(samples))
            check_replaceable(old.shape, clip.shape, space, vae.first_stage_model.side)
        rest = {key: value for key, value in (samples or {}).items() if key != WEIGHTS}
        parts, weights = [vae.encode(clip), *others], vae.first_stage_model.vae.weights_written
        return io.NodeOutput(rest | described(parts, space.name, len(pixels), weights))


def latent_inputs() -> list[io.Input]:
    """The inputs that all decode nodes have."""
    return [
        io.Latent.Input("samples", tooltip="A video latent of the space that this VAE reads."),
        io.Vae.Input("vae", tooltip="From Load KVAE."),
        advanced(
            io.Combo.Input,
            "scaling",
            options=[RAW, SCALED],
            tooltip="Latents of ComfyUI's own nodes are raw. Choose scaled for wrapper packs that pass on their "
            "sampler's internal latents (HunyuanVideoWrapper). If colours look flat or burnt, choose the other one.",
        ),
        memory_input(),
    ]


def memory_input() -> io.Input:
    """The input for the memory budget."""
    return advanced(
        io.Float.Input,
        "memory_gb",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.5,
        tooltip="GB that KVAE may use in addition to its weights. 0 is automatic: as much as ComfyUI says is free. A "
        "smaller budget gives the same result, more slowly. If it is too small for that, the error states the minimum.",
    )


def with_budget(vae: ComfyVAE, memory_gb: float, approximate: bool = False) -> ComfyVAE:
    """A copy of the VAE with that budget; 0 keeps the VAE's own.

    Raises:
        ValueError: memory_gb is negative or not finite.
    """
    if not math.isfinite(memory_gb) or memory_gb < 0:
        raise ValueError(f"memory_gb is {memory_gb}; expected a number of GB, or 0 for automatic")
    return vae.configured(round(memory_gb * 1e9) or vae.first_stage_model.planner.budget, approximate)


def decoder_and_latent(
    vae: ComfyVAE, latent: dict, scaling: str, memory_gb: float, approximate: bool = False, stream: bool = False
) -> tuple[ComfyVAE, torch.Tensor]:
    """A copy of the VAE with the settings of a decode node, and the raw latent [B, c, t, h, w] for it.

    All clips are checked here, before any work; the copy does not check them again.

    Args:
        stream: whether the frames are decoded segment by segment, so that only one segment must fit into memory.

    Raises:
        ValueError: the VAE is not from Load KVAE, the latent does not fit it, or a setting is out of range.
        MemoryError: there is no room for the frames.
    """
    check_vae(vae)
    if scaling not in (RAW, SCALED):
        raise ValueError(f"scaling is {scaling!r}; expected {RAW} or {SCALED}")
    z, space = samples_of(latent), vae.kvae_space
    check_shape(z.shape, space, space_of(latent))
    check_latent_weights(space.name, weights_of(latent), vae.first_stage_model.vae.weights_read)
    vae.first_stage_model.check_room(z.shape, stream)
    z = space.unscale(z.float()) if scaling == SCALED else z  # float16 would overflow
    check_finite(z, "latent")
    vae = with_budget(vae, memory_gb, approximate)
    vae.first_stage_model.latents_checked = True
    return vae, z


def check_vae(vae: object) -> None:
    """Raise unless the VAE comes from Load KVAE.

    Raises:
        ValueError: says what was found.
    """
    if not isinstance(vae, ComfyVAE):
        found = type(getattr(vae, "first_stage_model", vae)).__name__
        raise ValueError(
            f"This VAE is a {found}; expected one from Load KVAE. Connect Load KVAE, or use VAE Decode and VAE Encode."
        )
