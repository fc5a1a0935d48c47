"""Find a model's weights file: given as a file, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import WeightsError
from .foreign import parse_object
from .hub import HUB_IDS, WEIGHTS_FILES, hub_client, hub_reason, may_be_hub_id
from .paths import file_errors, read_text
from .spellings import MOST_CONFIG_BYTES, is_kvae

VAE = "vae"  # the folder of the VAE in that of a pipeline
_FILES = (*WEIGHTS_FILES, *(f"{VAE}/{file}" for file in WEIGHTS_FILES))


def find_weights(name: str | os.PathLike) -> Path:
    """The weights file that `name` refers to.

    Args:
        name: a file; a folder that holds the file, itself or, as a pipeline's folder does, in vae/; the name of a
            published model; or a hub id (owner/name). Only the last two use the network, and only if no such file or
            folder exists.

    Raises:
        WeightsError: no such file exists, or it cannot be downloaded.
    """
    path = Path(name)
    with file_errors(path):
        if path.is_dir():
            return _in_folder(path)
        if path.exists():
            return path
    repository = HUB_IDS.get(str(name), str(name))
    if path.suffix == ".safetensors" or not may_be_hub_id(repository):
        raise WeightsError(
            f"{name}: no such file or folder; give a .safetensors file, a folder, a hub id (owner/name), or the name "
            f"of a published KVAE ({', '.join(HUB_IDS)})"
        )
    return _in_folder(_download(repository))


def says_kvae(weights: Path) -> bool:
    """Whether the config.json beside a pipeline's VAE says that it is a KVAE-3D. The weights are not opened."""
    try:
        return is_kvae(parse_object(read_text(weights.with_name("config.json"), MOST_CONFIG_BYTES)))
    except (WeightsError, ValueError):
        return False


def _in_folder(folder: Path) -> Path:
    present = [place for file in _FILES if (place := folder / file).is_file()]
    if not present:
        raise WeightsError(f"{folder}: this folder holds neither {' nor '.join(WEIGHTS_FILES)}, nor does its {VAE}/")
    return present[0]


def _download(repository: str) -> Path:
    """The folder of the hub's cache that now holds the repository's weights and config."""
    patterns = [*_FILES, "config.json", f"{VAE}/config.json"]
    try:
        return Path(hub_client().snapshot_download(repository, allow_patterns=patterns))
    except WeightsError as error:
        raise WeightsError(f"{repository}: no such file or folder, and {error}") from None
    except Exception as error:  # which HTTP library raises it depends on huggingface_hub's version
        raise WeightsError(f"{repository}: no such file or folder, and the hub says: {hub_reason(error)}") from None
