"""KVAE Decode to Video: a latent decoded straight into a file."""

from __future__ import annotations

from comfy_api.latest import InputImpl, io, ui

from ..serving.clips import cut_clips, frames_to_keep
from ..serving.video_writer import CODECS, VideoWriter
from . import folders
from .coding import decoder_and_latent, latent_inputs
from .latent_dict import FRAMES
from .metadata import workflow_of
from .schema import VIDEO, advanced, schema
from .vae import ComfyVAE


class KVAEDecodeToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAEDecodeToVideo",
            display_name="KVAE Decode to Video",
            category=VIDEO,
            search_aliases=["save video", "video combine", "mp4", "latent to video", "long video", "low vram"],
            description="Decodes a video latent straight into a file, a few frames at a time: the frames of a long "
            "video never have to fit into memory together. Needs a VAE from Load KVAE.",
            inputs=[
                *latent_inputs(),
                io.Float.Input(
                    "fps", default=24.0, min=1.0, max=240.0, step=0.001, tooltip="Frames per second of the video."
                ),
                advanced(
                    io.Combo.Input,
                    "codec",
                    options=list(CODECS),
                    tooltip="h264 plays everywhere; h265 and av1 make smaller files.",
                ),
                advanced(
                    io.Int.Input,
                    "crf",
                    default=18,
                    min=0,
                    max=51,
                    tooltip="Constant quality: lower is better and makes larger files. 18 is hard to tell from the "
                    "original.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/KVAE",
                    tooltip="Folder and start of the name in ComfyUI's output folder.",
                ),
                io.Audio.Input("audio", optional=True, tooltip="Sound for the video, cut where the video ends."),
            ],
            outputs=[io.Video.Output(tooltip="The video that was written.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        samples: dict,
        vae: ComfyVAE,
        scaling: str,
        memory_gb: float,
        fps: float,
        codec: str,
        crf: int,
        filename_prefix: str,
        audio: dict | None = None,
    ) -> io.NodeOutput:
        vae, z = decoder_and_latent(vae, samples, scaling, memory_gb, stream=True)
        _, _, decoded, height, width = vae.first_stage_model.decode_output_shape(z.shape)
        path, file, subfolder = folders.output_path(filename_prefix, ".mp4", width, height)
        segments = cut_clips(vae.decode_stream(z), decoded, frames_to_keep(decoded, samples.get(FRAMES)))
        with VideoWriter(path, width, height, fps, codec, crf, audio, workflow_of(cls)) as writer:
            for frames in segments:
                writer.write(frames)
        preview = ui.PreviewVideo([ui.SavedResult(file, subfolder, io.FolderType.output)])
        return io.NodeOutput(InputImpl.VideoFromFile(path), ui=preview)
