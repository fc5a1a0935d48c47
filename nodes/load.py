"""Load KVAE: a KVAE file, and adapters for another model's latents → VAE."""

from __future__ import annotations

import os

import torch
from comfy_api.latest import io

from ..adapters import load_adapter
from ..adapters.spaces import native_space
from ..kvae import KVAE, WeightsError
from ..serving.about import about
from ..serving.host_vae import HostVAE
from . import folders
from .coding import memory_input, with_budget
from .patchers import hold, load_patcher
from .schema import LOADERS, advanced, schema
from .vae import ComfyVAE, free_once_unloaded, working_dtype

HUNYUAN, NATIVE = "HunyuanVideo / Kandinsky 5", "KVAE (native)"
AUTO, NONE = "auto", "none"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class KVAELoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        adapters = [AUTO, *folders.adapter_names(), NONE]
        return schema(
            node_id="KVAELoad",
            display_name="Load KVAE",
            category=LOADERS,
            search_aliases=["load vae", "vae loader", "video vae", "hunyuan vae", "kandinsky vae"],
            description="Loads KVAE-3D as a VAE for every node that uses one. With latent adapters it replaces the VAE "
            "of HunyuanVideo and Kandinsky 5: use it instead of Load VAE.",
            inputs=[
                io.Combo.Input(
                    "kvae_name",
                    options=folders.kvae_names(),
                    tooltip="The KVAE-3D weights, from models/kvae or models/vae, or the VAE of Kandinsky 6's "
                    "super-resolution in models/diffusion_models.",
                ),
                advanced(
                    io.Combo.Input,
                    "latents",
                    options=[HUNYUAN, NATIVE],
                    tooltip="Which model's latents this VAE reads and writes. HunyuanVideo / Kandinsky 5: through "
                    "latent adapters. KVAE (native): for models trained on KVAE latents, or to encode and decode with "
                    "KVAE alone.",
                ),
                advanced(
                    io.Combo.Input,
                    "decode_adapter",
                    options=adapters,
                    tooltip="HunyuanVideo → KVAE, from models/latent_adapters. auto: the only file that fits, by its "
                    "metadata or its published name. none: the VAE only encodes. Not used for native latents.",
                ),
                advanced(
                    io.Combo.Input,
                    "encode_adapter",
                    options=adapters,
                    tooltip="KVAE → HunyuanVideo, from models/latent_adapters; needed for image-to-video. auto: the "
                    "only file that fits, by its metadata or its published name. none: the VAE only decodes. Not used "
                    "for native latents.",
                ),
                advanced(
                    io.Combo.Input,
                    "dtype",
                    options=[AUTO, *DTYPES],
                    tooltip="auto: what ComfyUI uses for VAEs on this machine. bf16 needs half the memory of fp32.",
                ),
                memory_input(),
            ],
            outputs=[
                io.Vae.Output(tooltip="For VAE Decode, VAE Encode, image-to-video nodes and the nodes of this pack."),
                io.String.Output(
                    display_name="about",
                    tooltip="The files, what their adapters reach, and the memory that usual sizes need.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, kvae_name: str) -> bool | str:
        # ComfyUI repeats a message for every input named here; it checks the adapters by itself
        try:
            if kvae_name is not None:  # None: linked to another node
                folders.kvae_path(kvae_name)
        except WeightsError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, kvae_name: str, dtype: str, **_) -> list:
        adapters = [folders.adapter_path(name) for name in folders.adapter_names()]
        kvae, *others = folders.stamp(folders.kvae_path(kvae_name), *adapters)
        hold(kvae, DTYPES.get(dtype) or working_dtype())
        return [kvae, *others]

    @classmethod
    def execute(
        cls, kvae_name: str, latents: str, decode_adapter: str, encode_adapter: str, dtype: str, memory_gb: float
    ) -> io.NodeOutput:
        for name, value, known in (("latents", latents, (HUNYUAN, NATIVE)), ("dtype", dtype, (AUTO, *DTYPES))):
            if value not in known:  # ComfyUI does not check linked text against the list
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        (stamp,) = folders.stamp(folders.kvae_path(kvae_name))
        patcher = load_patcher(stamp, DTYPES.get(dtype) or working_dtype())
        kvae, paths = patcher.model, ["", ""]
        if latents != NATIVE:
            paths = hunyuan_adapters(kvae, kvae_name, decode_adapter, encode_adapter)
        ways = adapter_ways(kvae)
        adapters = [load_adapter(path, way) if path else None for path, way in zip(paths, ways, strict=True)]
        vae = with_budget(ComfyVAE(HostVAE(kvae, *adapters), patcher), memory_gb)
        names = [kvae_name, *map(os.path.basename, paths)]
        return io.NodeOutput(vae, about(vae.first_stage_model, names, free_once_unloaded(patcher)))


def hunyuan_adapters(kvae: KVAE, kvae_name: str, decode: str, encode: str) -> list[str]:
    """The paths of the adapters (to decode, to encode) between HunyuanVideo's latents and this KVAE's, chosen by name
    or found; empty for none.

    Raises:
        WeightsError: both are missing, or several fit.
    """
    if decode == encode == NONE:
        raise WeightsError(f'Both adapters are none: choose one of them, or choose latents "{NATIVE}".')
    ways = adapter_ways(kvae)
    paths = [_adapter(*each, kvae_name, kvae) for each in zip((decode, encode), ways, strict=True)]
    if not any(paths):
        raise WeightsError(folders.no_adapters(*ways[0]))
    return paths


def adapter_ways(kvae: KVAE) -> tuple[tuple[str, str], tuple[str, str]]:
    """The spaces (source, target) of the adapters to decode and to encode."""
    native = native_space(kvae.config).name
    return ("hunyuan_video", native), (native, "hunyuan_video")


def _adapter(choice: str, way: tuple[str, str], kvae_name: str, kvae: KVAE) -> str:
    if choice == NONE:
        return ""
    return folders.find_adapter(*way, kvae_name, kvae) or "" if choice == AUTO else folders.adapter_path(choice)
