"""Load KVAE: a KVAE file, and adapters for another model's latents → VAE."""

from __future__ import annotations

import os

from comfy_api.latest import io

from ..adapters import load_adapter
from ..adapters.spaces import LatentSpace, native_space
from ..kvae import KVAE, WeightsError
from ..serving.about import about
from ..serving.dtypes import DTYPES
from ..serving.host_vae import HostVAE
from . import folders
from .coding import memory_input, with_budget
from .patchers import hold, load_patcher
from .schema import LOADERS, advanced, schema
from .served import CHOICES, NATIVE, SPACES, cannot_serve, quoted, served_by
from .vae import ComfyVAE, free_once_unloaded, working_dtype

AUTO, NONE = "auto", "none"


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
            "of HunyuanVideo, HunyuanVideo 1.5 and Kandinsky 5: use it instead of Load VAE.",
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
                    options=CHOICES,
                    extra_dict={"served": {name: served_by(space) for name, space in folders.spaces().items()}},
                    tooltip="Which model's latents this VAE reads and writes. HunyuanVideo / Kandinsky 5 and "
                    "HunyuanVideo 1.5 (KVAE 2.0-t4s16 only): through latent adapters. KVAE (native): for models "
                    "trained on KVAE latents, or to encode and decode with KVAE alone.",
                ),
                advanced(
                    io.Combo.Input,
                    "decode_adapter",
                    options=adapters,
                    tooltip="The model's latents → KVAE's, from models/latent_adapters. auto: the only file that fits, "
                    "by its metadata or its published name. none: the VAE only encodes. Not used for native latents.",
                ),
                advanced(
                    io.Combo.Input,
                    "encode_adapter",
                    options=adapters,
                    tooltip="KVAE's latents → the model's, from models/latent_adapters; needed for image-to-video. "
                    "auto: the only file that fits, by its metadata or its published name. none: the VAE only decodes. "
                    "Not used for native latents.",
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
        for name, value, known in (("latents", latents, CHOICES), ("dtype", dtype, (AUTO, *DTYPES))):
            if value not in known:  # ComfyUI does not check linked text against the list
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        native = folders.space_of(kvae_name)
        if latents not in served_by(native):
            raise WeightsError(cannot_serve(kvae_name, native, latents))
        (stamp,) = folders.stamp(folders.kvae_path(kvae_name))
        patcher = load_patcher(stamp, DTYPES.get(dtype) or working_dtype())
        ways, paths = adapter_ways(latents, native), ["", ""]
        if latents != NATIVE:
            paths = find_adapters(patcher.model, kvae_name, latents, decode_adapter, encode_adapter)
        adapters = [load_adapter(path, way) if path else None for path, way in zip(paths, ways, strict=True)]
        vae = with_budget(ComfyVAE(HostVAE(patcher.model, *adapters), patcher), memory_gb)
        names = [kvae_name, *map(os.path.basename, paths)]
        return io.NodeOutput(vae, about(vae.first_stage_model, names, free_once_unloaded(patcher)))


def find_adapters(kvae: KVAE, kvae_name: str, latents: str, decode: str, encode: str) -> list[str]:
    """The paths of the adapters (to decode, to encode) between these latents and the KVAE's, chosen by name or found;
    empty for none.

    Raises:
        WeightsError: both are missing, or several fit.
    """
    if decode == encode == NONE:
        raise WeightsError(f'Both adapters are none: choose one of them, or choose latents "{NATIVE}".')
    native = native_space(kvae.config)
    ways = adapter_ways(latents, native)
    paths = [_adapter(*each, kvae_name, kvae) for each in zip((decode, encode), ways, strict=True)]
    if not any(paths):
        others = [choice for choice in served_by(native) if choice != latents]
        raise WeightsError(folders.no_adapters(*ways[0], kvae_name, instead=quoted(others)))
    return paths


def adapter_ways(latents: str, native: LatentSpace) -> tuple[tuple[str, str], tuple[str, str]]:
    """The spaces (source, target) of the adapters to decode and to encode."""
    foreign = SPACES.get(latents, native).name
    return (foreign, native.name), (native.name, foreign)


def _adapter(choice: str, way: tuple[str, str], kvae_name: str, kvae: KVAE) -> str:
    if choice == NONE:
        return ""
    return folders.find_adapter(*way, kvae_name, kvae) or "" if choice == AUTO else folders.adapter_path(choice)
