"""Decode latent files of ComfyUI, musubi-tuner, diffusers and Kandinsky 5 with KVAE, one after the other.

    python -m training decode latents/ --output videos --kvae KVAE-3D-1.0 --adapter-h2k h2k.safetensors

A clip becomes an mp4 file, a latent of one frame a png. The same command continues after an interruption. Frames are
written as they are decoded, so memory does not grow with the length of a clip.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.checks import latent_kind
from ...adapters.spaces import SPACES, fitting_spaces
from ...adapters.weights import check_latent_weights
from ...kvae import SEGMENT_FRAMES
from ...serving.clip_files import ClipWriter, write_clips
from ...serving.clips import frames_to_keep
from ...serving.host_vae import HostVAE, to_image
from ...serving.latent_files import LatentFile
from ...serving.video_writer import CODECS, CRF, FASTEST, SLOWEST, VideoWriter
from ..errors import UserError
from ..options import argument, option
from ..served import ServedOptions, load_kvae_of, load_served
from .bulk import Bulk, Progress
from .made import KEY, PictureFile, PictureFolder, is_there, made_of
from .options import ENDINGS, ReadingOptions, read
from .sources import Source, find_sources

MP4, FRAMES, PNG = "mp4", "frames", "png"


@dataclass(kw_only=True)
class DecodeConfig(ServedOptions, ReadingOptions):
    inputs: list[str] = argument("latent files, and folders of them", "INPUT")  # noqa: RUF009
    output: str = option(..., "folder to write to", writes="folder")
    format: str = option(
        MP4, "mp4, a folder with a png of each frame, or one png of the first frame", (MP4, FRAMES, PNG)
    )
    previews: bool = option(False, "before anything else, write the first frame of every clip to OUTPUT/previews")
    fps: float = option(24.0, "frames per second of mp4 files", least=float(SLOWEST), most=FASTEST)
    codec: str = option("h264", "h264 plays everywhere; h265 and av1 make smaller files", tuple(CODECS))
    crf: int = option(18, "quality of mp4 files; lower is better and larger", least=CRF[0], most=CRF[-1])


@dataclass(frozen=True)
class Task:
    """A latent file to decode.

    Attributes:
        shape: of its latent, [B, c, t, h, w].
        kept: the frames of each clip that are kept.
        form: MP4, FRAMES or PNG.
        names: of each clip, without an ending.
        made: what its results are made of.
        sound: whether the file holds more than the video.
    """

    source: Source
    vae: HostVAE
    shape: tuple[int, ...]
    kept: int
    form: str
    names: list[str]
    made: str
    sound: bool

    @property
    def work(self) -> int:
        """Latents to decode, for the progress."""
        b, _, t, h, w = self.shape
        return b * t * h * w

    def results(self, folder: str) -> list[Path]:
        """The file, or the folder, of each clip."""
        ending = {MP4: ".mp4", PNG: ".png", FRAMES: ""}[self.form]
        return [Path(folder, name + ending) for name in self.names]

    def previews(self, folder: str) -> list[Path]:
        """The picture of each clip to look at before."""
        return [Path(folder, "previews", f"{name}.jpg") for name in self.names]


@torch.inference_mode()
def run(config: DecodeConfig) -> int:
    """Decode all files; return the exit code."""
    sources = find_sources(config.inputs, ENDINGS)
    bulk, vaes, tasks = Bulk("decoded", len(sources)), VAEs(config), []
    for source in sources:
        with bulk.file(source.path):
            task = _task(source, vaes, config)
            bulk.take(source.path, task.results(config.output), task.made)
            tasks.append(task)
    if config.previews:
        _each(tasks, config, bulk, previews=True)
    _each([task for task in tasks if bulk.left(task.source.path)], config, bulk)
    return bulk.finish(config.output)


class VAEs:
    """The VAEs for the spaces of a run's latents. They share one KVAE.

    Raises:
        WeightsError: there is no such KVAE.
    """

    def __init__(self, config: DecodeConfig):
        self.config, self.kvae = config, load_kvae_of(config)
        self.vaes: dict[str, HostVAE] = {}

    def of(self, space: str) -> HostVAE:
        """The VAE that decodes latents of a space.

        Raises:
            UserError, WeightsError: the adapter is missing, or it is another one.
        """
        if space not in self.vaes:
            self.vaes[space] = load_served(self.config, space, ("decode",), self.kvae)
        return self.vaes[space]


def _task(source: Source, vaes: VAEs, config: DecodeConfig) -> Task:
    """Read a file, and find out what is to be made of it.

    Raises:
        UserError, WeightsError, ValueError: it cannot be read, or not be decoded.
    """
    found = read(source.path, config)
    vae = vaes.of(_space(source.path, found))
    check_latent_weights(vae.space.name, found.weights, vae.vae.weights_read)
    clips, _, decoded, _, _ = vae.decode_output_shape(found.z.shape)
    form = PNG if decoded == 1 else config.format
    settings: dict[str, Any] = {"scaling": config.scaling, "model": config.model, "format": form}
    if form == MP4:
        settings |= {"fps": config.fps, "codec": config.codec, "crf": config.crf}
    kept = 1 if form == PNG else frames_to_keep(decoded, found.frames, vae.space.temporal_factor)
    names = [source.name if clips == 1 else f"{source.name}.{clip:03d}" for clip in range(clips)]
    made = made_of(source.path, vae, settings)
    return Task(source, vae, tuple(found.z.shape), kept, form, names, made, sound=bool(found.others))


def _space(path: Path, found: LatentFile) -> str:
    """The name of the space of a latent.

    Raises:
        UserError: the file does not tell, and several have its shape.
        ValueError: no space has its shape.
    """
    fitting = [space.name for space in fitting_spaces(found.z.shape)]
    if found.space or len(fitting) == 1:
        return found.space or fitting[0]
    if fitting:
        raise UserError(f"{path}: the file does not say whether it is of {' or '.join(fitting)}; set --model")
    raise ValueError(f"{path}: this is {latent_kind(found.z.shape)}; expected one of {', '.join(SPACES)}")


def _each(tasks: list[Task], config: DecodeConfig, bulk: Bulk, previews: bool = False) -> None:
    """Decode the clips of all tasks, or only their first frames."""
    with Progress("previews" if previews else "decode", [task.work for task in tasks]) as progress:
        for task in tasks:
            path, task.vae.on_progress = task.source.path, progress.of_file(task.work)
            with bulk.file(path):
                if task.sound and not previews:
                    bulk.say(f"{path}: only the video is decoded; the sound in it needs the audio VAE of its model")
                pictures = task.previews(config.output)
                if previews and all([is_there(picture, task.made) for picture in pictures]):
                    continue
                _decode(task, read(path, config).z, config, pictures if previews else [])
                if not previews:
                    bulk.made.add(path)


def _decode(task: Task, z: Tensor, config: DecodeConfig, previews: list[Path]) -> None:
    """Write what a task asks for, or only the previews."""
    form, kept, paths = (PNG, 1, previews) if previews else (task.form, task.kept, task.results(config.output))
    if form == PNG:  # the first segment is decoded as in the whole clip, the first latent alone is not
        z = z[:, :, : SEGMENT_FRAMES // task.vae.space.temporal_factor + 1]
    clips, _, decoded, height, width = task.vae.decode_output_shape(z.shape)

    def new_file(clip: int) -> AbstractContextManager[ClipWriter]:
        if form == PNG:
            return PictureFile(paths[clip], task.made)
        if form == FRAMES:
            return PictureFolder(paths[clip], task.made)
        codec = config.codec, config.crf, None, {KEY: task.made}
        return VideoWriter(paths[clip], width, height, config.fps, *codec)

    segments = (to_image(frames)[0].movedim(0, -1) for frames in task.vae.decode_stream(z))
    write_clips(segments, clips, decoded, kept, new_file)
