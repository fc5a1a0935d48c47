"""Find the file that holds a model's weights: named, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .files import WeightsError

FILE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # the official layout's, and diffusers'


def find_weights(name: str | os.PathLike, subfolder: str = "") -> Path:
    """The weights file that `name` means: itself, the one in that folder (or in its subfolder), or on the hub.

    Only a hub id (owner/name, where no such folder is) touches the network.

    Raises:
        WeightsError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        places = [folder / file for folder in dict.fromkeys((path, path / subfolder)) for file in FILE_NAMES]
        present = [place for place in places if place.is_file()]
        if not present:
            raise WeightsError(f"{path}: this folder holds neither {' nor '.join(FILE_NAMES)}")
        return present[0]
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise WeightsError(
            f"{name}: no such file or folder; give a .safetensors file, a folder or a hub id (owner/name)"
        )
    return find_weights(_download(str(name), subfolder), subfolder)


def _download(repository: str, subfolder: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise WeightsError(
            f"{repository}: no such file or folder, and without the package huggingface_hub nothing can be "
            "downloaded; give a .safetensors file or a folder, or install huggingface_hub"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        return Path(
            snapshot_download(repository, allow_patterns=[prefix + file for file in (*FILE_NAMES, "config.json")])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"{repository}: no such file or folder, and the hub says: {str(error).splitlines()[0]}"
        ) from None
