"""KVAE Decode to Video: a latent decoded straight into a file."""

from __future__ import annotations

from comfy_api.latest import InputImpl, io, ui

from ..serving.clip_files import write_clips
from ..serving.clips import frames_to_keep
from ..serving.remembered import Remembered
from ..serving.sound import audio_of_clip, waveform_of
from ..serving.video_writer import CODECS, VideoWriter
from .coding import decoder_and_latent, latent_inputs
from .input_output import output_path, saved_result
from .latent_dict import FRAMES, SPACE, parts_of
from .metadata import workflow_of
from .schema import VIDEO, advanced, schema
from .soundtrack import decode_soundtrack
from .vae import ComfyVAE

WRITTEN = Remembered()


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
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Sound for the video, cut where the video ends. A batch of latents may come with a batch "
                    "of sounds; a single sound is for every clip.",
                ),
                io.Vae.Input(
                    "audio_vae",
                    optional=True,
                    tooltip="The audio VAE of the model: decodes the audio part of the latent for the video, if no "
                    "audio is connected.",
                ),
                advanced(
                    io.Boolean.Input,
                    "keep_unfinished",
                    default=False,
                    optional=True,  # prompts that were saved before it was there still run
                    tooltip="After Cancel or an error. Off: no file. On: a playable file of the frames that were "
                    "finished, with their sound.",
                ),
            ],
            outputs=[
                io.Video.Output(
                    is_output_list=True, tooltip="The video that was written; of a batch, one for each clip."
                )
            ],
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
        keep_unfinished: bool = False,
        audio_vae=None,
    ) -> io.NodeOutput:
        decodes_audio = audio is None and audio_vae is not None

        def write() -> list[str]:
            decoder, z = decoder_and_latent(vae, samples, scaling, memory_gb, stream=True)
            _, _, decoded, height, width = decoder.first_stage_model.decode_output_shape(z.shape)
            sounds = decode_soundtrack(audio_vae, samples) if decodes_audio else audio  # small: before the video
            paths: list[str] = []

            def new_file(clip: int) -> VideoWriter:
                paths.append(output_path(filename_prefix, ".mp4", width, height)[0])
                sound = audio_of_clip(sounds, clip, len(z))
                return VideoWriter(paths[-1], width, height, fps, codec, crf, sound, workflow_of(cls), keep_unfinished)

            kept = frames_to_keep(decoded, samples.get(FRAMES))
            write_clips(decoder.decode_stream(z), len(z), decoded, kept, new_file)
            return paths

        waveform, rate = (None, None) if audio is None else waveform_of(audio)
        sound_of = audio_vae if decodes_audio else waveform
        made_of = [each for each in (*parts_of(samples), vae, sound_of) if each is not None]
        latent = samples.get(SPACE), samples.get(FRAMES), samples.get("sample_rate")
        settings = (*latent, rate, scaling, memory_gb, fps, codec, crf, filename_prefix)
        paths = WRITTEN.of(made_of, settings, write)  # the page may ask again for a file that is there
        preview = ui.PreviewVideo([saved_result(path) for path in paths])
        return io.NodeOutput([InputImpl.VideoFromFile(path) for path in paths], ui=preview)
