"""The options that say how a latent file is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...serving.architectures import MODELS
from ...serving.latent_files import LatentFile, load_latent
from ..options import option

AUTO = "auto"
SCALINGS = {AUTO: None, "raw": False, "scaled": True}
ENDINGS = (".latent", ".safetensors")  # of latent files


@dataclass
class ReadingOptions:
    scaling: str = option(
        AUTO, "what the files hold: raw latents, or a sampler's scaled ones; auto goes by the file", tuple(SCALINGS)
    )
    model: str = option(
        AUTO,
        "the model of all the latents; auto goes by the file, and an error asks for it if a file can be read in two "
        "ways",
        (AUTO, *MODELS),
    )


def read(path: Path, options: ReadingOptions) -> LatentFile:
    """Read a latent file.

    Raises:
        WeightsError: see `load_latent`.
    """
    return load_latent(path, SCALINGS[options.scaling], None if options.model == AUTO else options.model)
