"""Find the file that holds a model's weights: named, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import WeightsError
from .paths import file_errors

FILE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # the official layout's, and diffusers'
# what the published models are called by → where they are on the hub
HUB = {name: f"kandinskylab/{name}" for name in ("KVAE-3D-1.0", "KVAE-3D-2.0-t4s8", "KVAE-3D-2.0-t4s16")}


def find_weights(name: str | os.PathLike, subfolder: str = "") -> Path:
    """The weights file that `name` means: itself, the one in that folder (or in its subfolder), or on the hub.

    Only a hub id (owner/name) or the name of a published model touches the network, and only where no such file or
    folder is.

    Raises:
        WeightsError: there is none.
    """
    path = Path(name)
    with file_errors(path):
        if path.is_dir():
            return _in_folder(path, subfolder)
        if path.exists():
            return path
    repository = HUB.get(str(name), str(name))
    if path.suffix == ".safetensors" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise WeightsError(
            f"{name}: no such file or folder; give a .safetensors file, a folder, {', '.join(HUB)} or a hub id "
            "(owner/name)"
        )
    return _in_folder(_download(repository, subfolder), subfolder)


def _in_folder(folder: Path, subfolder: str) -> Path:
    places = [each / file for each in dict.fromkeys((folder, folder / subfolder)) for file in FILE_NAMES]
    present = [place for place in places if place.is_file()]
    if not present:
        raise WeightsError(f"{folder}: this folder holds neither {' nor '.join(FILE_NAMES)}")
    return present[0]


def _download(repository: str, subfolder: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise WeightsError(
            f"{repository}: no such file or folder, and without the package huggingface_hub nothing can be "
            "downloaded; give a .safetensors file or a folder, or install huggingface_hub"
        ) from None
    except ValueError as error:  # it reads HF_ENDPOINT when it is imported
        raise WeightsError(f"{repository}: no such file or folder, and HF_ENDPOINT is no address ({error})") from None
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + file for file in (*FILE_NAMES, "config.json")]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's HTTP library, and its errors, are not the same in every version
        first = (str(error) or type(error).__name__).splitlines()[0]
        where = " (HF_ENDPOINT is set)" if os.environ.get("HF_ENDPOINT") else ""
        raise WeightsError(f"{repository}: no such file or folder, and the hub says: {first}{where}") from None
