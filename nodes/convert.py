"""Load Latent Adapter and Convert Latent: convert latents of one space to another."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..adapters import LatentAdapter, load_adapter
from ..adapters.checks import check_latent
from ..adapters.weights import check_latent_weights
from ..kvae import WeightsError
from . import folders
from .latent_dict import FRAMES, WEIGHTS, described, parts_of, space_of, weights_of
from .schema import LATENT, LOADERS, schema

Adapter = io.Custom("KVAE_LATENT_ADAPTER")


class KVAELoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAELoadAdapter",
            display_name="Load Latent Adapter",
            category=LOADERS,
            search_aliases=["load adapter", "adapter loader", "hunyuan adapter", "kandinsky adapter"],
            description="Loads an adapter between two latent spaces, for Convert Latent.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    tooltip="An adapter file from models/latent_adapters.",
                )
            ],
            outputs=[
                Adapter.Output(display_name="adapter", tooltip="For Convert Latent."),
                io.String.Output(
                    display_name="about", tooltip="What it maps, what it was trained on, and what it reached."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        try:
            folders.adapter_path(adapter_name)
        except WeightsError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> list:
        return folders.stamp(folders.adapter_path(adapter_name))

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        adapter = load_adapter(folders.adapter_path(adapter_name))
        return io.NodeOutput(adapter, adapter.about())


class KVAEConvertLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAEConvertLatent",
            display_name="Convert Latent",
            category=LATENT,
            search_aliases=["adapter", "latent to latent", "hunyuan to kvae", "kandinsky to kvae"],
            description="Maps a latent from one space to another with an adapter, for example HunyuanVideo → KVAE. "
            "Load KVAE with adapters does this by itself; use this node to work on the converted latent.",
            inputs=[
                io.Latent.Input("samples", tooltip="A latent of the space that the adapter maps from."),
                Adapter.Input("adapter", tooltip="From Load Latent Adapter."),
            ],
            outputs=[io.Latent.Output(tooltip="The latent in the space that the adapter maps to.")],
        )

    @classmethod
    def execute(cls, samples: dict, adapter: LatentAdapter) -> io.NodeOutput:
        if not isinstance(adapter, LatentAdapter):
            raise ValueError(f"This adapter is a {type(adapter).__name__}; expected one from Load Latent Adapter.")
        z, *others = parts_of(samples)
        source, target = adapter.source.name, adapter.target.name
        check_latent(z, adapter.source, space_of(samples))
        adapter.check_shape(z.shape)
        check_latent_weights(source, weights_of(samples), adapter.weights.get(source))
        device = comfy.model_management.get_torch_device()
        converted = adapter.to(device).convert(z.to(device)).to(comfy.model_management.intermediate_device())
        rest = {key: value for key, value in samples.items() if key != WEIGHTS}
        parts = [converted, *others]
        return io.NodeOutput(rest | described(parts, target, samples.get(FRAMES), adapter.weights.get(target)))
