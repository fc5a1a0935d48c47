"""KVAE Decode and KVAE Encode: what VAE Decode and VAE Encode do, and what they cannot know."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io

from ..adapters.inspect import check_finite, check_shape, check_tensor
from ..serving.clips import kept_frames, to_clip
from ..serving.memory import room_for
from .latent_dict import FRAMES, SPACE, samples_of, space_of
from .vae import KVAEVae

RAW, SCALED = "raw", "scaled"


class KVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KVAEDecode",
            display_name="KVAE Decode",
            category="KVAE",
            description="Decodes a video latent with a VAE from Load KVAE. In addition to what VAE Decode does, it "
            "checks that the latent belongs to the VAE's space, accepts latents from wrapper packs, decodes the video "
            "part of a latent with audio, and returns exactly the frames that KVAE Encode got.",
            inputs=[
                *latent_inputs(),
                io.Boolean.Input(
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
        cls, samples: dict, vae: KVAEVae, scaling: str, memory_gb: float, approximate: bool = False
    ) -> io.NodeOutput:
        z = latent_for(vae, samples, scaling, stream=False)
        frames = within(vae, memory_gb, approximate).decode(z)
        return io.NodeOutput(frames[:, : kept_frames(frames.shape[1], samples.get(FRAMES))].flatten(0, 1))


class KVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KVAEEncode",
            display_name="KVAE Encode",
            category="KVAE",
            description="Encodes a clip with a VAE from Load KVAE. In addition to what VAE Encode does, it keeps every "
            "frame, by repeating the last one up to the next 4n + 1, and writes the name of its space into the latent.",
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="The frames of one clip. Sides are cropped to a multiple of 8 (of 16 for KVAE 2.0-t4s16).",
                ),
                io.Vae.Input("vae", tooltip="From Load KVAE."),
            ],
            outputs=[io.Latent.Output(tooltip="The latent of the clip: raw, as ComfyUI's samplers expect it.")],
        )

    @classmethod
    def execute(cls, pixels: torch.Tensor, vae: KVAEVae) -> io.NodeOutput:
        check_vae(vae)
        check_tensor(pixels, "pixels")
        room_for(pixels.shape, "cpu", f"pixels, {list(pixels.shape)}: encode fewer or smaller frames")
        clip = to_clip(pixels, vae.kvae_space.time)
        return io.NodeOutput({"samples": vae.encode(clip), SPACE: vae.kvae_space.name, FRAMES: len(pixels)})


def latent_inputs() -> list[io.Input]:
    """The inputs of every node that decodes."""
    return [
        io.Latent.Input("samples", tooltip="A video latent of the space that this VAE reads."),
        io.Vae.Input("vae", tooltip="From Load KVAE."),
        io.Combo.Input(
            "scaling",
            options=[RAW, SCALED],
            tooltip="Latents of ComfyUI's own nodes are raw. Choose scaled for wrapper packs that pass on their "
            "sampler's internal latents (HunyuanVideoWrapper). If colours look flat or burnt, choose the other one.",
        ),
        memory_input(),
    ]


def memory_input() -> io.Input:
    """The input for a budget."""
    return io.Float.Input(
        "memory_gb",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.5,
        tooltip="GB that KVAE may use in addition to its weights. 0 is automatic: as much as ComfyUI says is free. A "
        "smaller budget gives the same result, more slowly. If it is too small for that, the error states the minimum.",
    )


def within(vae: KVAEVae, memory_gb: float, approximate: bool = False) -> KVAEVae:
    """The VAE with that budget (0: its own), exact or not.

    Raises:
        ValueError: it is no budget.
    """
    if not math.isfinite(memory_gb) or memory_gb < 0:
        raise ValueError(f"memory_gb is {memory_gb}; expected a number of GB, or 0 for what is free")
    return vae.within(round(memory_gb * 1e9) or vae.first_stage_model.budget, approximate)


def latent_for(vae: KVAEVae, latent: dict, scaling: str, stream: bool = True) -> torch.Tensor:
    """The raw latent [B, c, t, h, w] to decode, as a stream or as a whole.

    Raises:
        ValueError: the VAE is not one of ours, or the latent is not for it.
        MemoryError: there is no room for its frames.
    """
    check_vae(vae)
    if scaling not in (RAW, SCALED):
        raise ValueError(f"scaling is {scaling!r}; expected {RAW} or {SCALED}")
    z = samples_of(latent)
    check_shape(z.shape, vae.kvae_space, space_of(latent))
    vae.first_stage_model.check_room(z.shape, stream)
    check_finite(z, "latent")
    return vae.kvae_space.unscale(z) if scaling == SCALED else z


def check_vae(vae: object) -> None:
    """Refuse a VAE that does not come from Load KVAE.

    Raises:
        ValueError: says which VAE it is.
    """
    if not isinstance(vae, KVAEVae):
        found = type(getattr(vae, "first_stage_model", vae)).__name__
        raise ValueError(
            f"This VAE is a {found}; expected one from Load KVAE. Connect Load KVAE, or use VAE Decode and VAE Encode."
        )
