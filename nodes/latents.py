"""Inspect Latent, Save Latent and Load Latent from File."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io, ui

from ..kvae import WeightsError
from ..serving.architectures import MODELS
from ..serving.inspect import describe, describe_file
from ..serving.latent_files import load_latent
from ..serving.latent_writers import save_latent
from . import folders
from .input_output import has_latent, latent_path, output_path
from .latent_dict import FRAMES, described, parts_of, space_of, weights_of
from .latent_extras import entries_of, extras_of
from .metadata import workflow_of
from .schema import LATENT, schema

AUTO = "auto"
SCALINGS = {AUTO: None, "raw": False, "scaled": True}
SAVED = "latents"  # the folder in ComfyUI's output that Save Latent writes to by default


class KVAEInspectLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAEInspectLatent",
            display_name="Inspect Latent",
            category=LATENT,
            search_aliases=["latent info", "latent shape", "latent size", "debug latent"],
            description="Reports what a latent is: its shape, the video it decodes to, its statistics, which model's "
            "space it looks like and why, and the audio in it.",
            inputs=[io.Latent.Input("samples", tooltip="Any latent.")],
            outputs=[io.String.Output(display_name="report", tooltip="The report as text.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        z, *others = parts_of(samples)
        report = describe(z, space_of(samples), others, weights_of(samples))
        report = "\n".join([report, *extras_of(samples).about()])
        return io.NodeOutput(report, ui=ui.PreviewText(report))


class KVAESaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAESaveLatent",
            display_name="Save Latent (KVAE)",
            category=LATENT,
            search_aliases=["latent save", "checkpoint latent", "export latent", "keep latent"],
            description="Saves a latent before it is decoded: if decoding fails after a long sampling, decode the "
            "file. It is a ComfyUI .latent file that also names the latent's space and VAE.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to save, with the audio if it has any."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{SAVED}/KVAE",
                    tooltip="Folder and start of the name in ComfyUI's output folder. Load Latent from File looks in "
                    f"output/{SAVED}.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The same latent. Connect it to the decoder, so that it is saved first.")
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict, filename_prefix: str) -> io.NodeOutput:
        path, file, subfolder = output_path(filename_prefix, ".latent")
        z, *others = parts_of(samples)
        space, weights, extras = space_of(samples), weights_of(samples), extras_of(samples)
        save_latent(path, z, space, samples.get(FRAMES), workflow_of(cls), others, extras, weights)
        return io.NodeOutput(samples, ui={"latents": [ui.SavedResult(file, subfolder, io.FolderType.output)]})


class KVAELoadLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAELoadLatent",
            display_name="Load Latent from File",
            category=LATENT,
            search_aliases=["load latent", ".latent", "import latent", "open latent", "musubi", "diffusers"],
            description="Loads a latent that ComfyUI, musubi-tuner or diffusers saved, and returns it raw. Reads only "
            "safetensors files: a pickle (.pt, .bin) can run code when it is opened.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_latent_files(),
                    tooltip="A .latent or .safetensors file from ComfyUI's input folder, or a .latent file from "
                    f"output/{SAVED}.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=list(SCALINGS),
                    tooltip="Whether the file holds a raw latent or a sampler's scaled one. auto decides by the kind "
                    "of file.",
                ),
                io.Combo.Input(
                    "model",
                    options=[AUTO, *MODELS],
                    optional=True,
                    tooltip="Which model the latent belongs to. auto decides by the file; if the file can be read in "
                    "two ways, an error asks you to choose. diffusers saves Kandinsky 5 latents with channels last, "
                    "all others with channels first.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The latent, raw, with the audio if the file has any."),
                io.String.Output(display_name="report", tooltip="How the file was read, and what the latent is."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        try:
            if file is not None:  # None: linked to another node
                latent_path(file)
        except WeightsError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> list:
        return folders.stamp(latent_path(file))

    @classmethod
    def execute(cls, file: str, scaling: str, model: str = AUTO) -> io.NodeOutput:
        if scaling not in SCALINGS:
            raise ValueError(f"scaling is {scaling!r}; expected one of {', '.join(SCALINGS)}")
        path = latent_path(file)  # checked again: since validate_inputs it may have become a link to elsewhere
        found = load_latent(path, SCALINGS[scaling], None if model == AUTO else model)
        latent = described([found.z, *found.others], found.space, found.frames, found.weights)
        latent |= entries_of(found.extras)
        report = describe_file(found)
        if latent["samples"] is found.z and found.others:
            report += "\nThis ComfyUI has no latents with audio: the output is the video part. Update ComfyUI for both."
        return io.NodeOutput(latent, report)


def _latent_files() -> list[str]:
    """The names to choose from. Links that lead out of ComfyUI's folders are left out."""
    found = []
    for folder, below, ending, suffix in (
        (folder_paths.get_input_directory(), "", (".latent", ".safetensors"), ""),
        (folder_paths.get_output_directory(), SAVED, (".latent",), " [output]"),
    ):
        for path, _, names in os.walk(os.path.join(folder, below)):
            relative = os.path.relpath(path, folder)
            found += [os.path.normpath(os.path.join(relative, n)) + suffix for n in sorted(names) if n.endswith(ending)]
    return [name for name in found if has_latent(name)]
