"""Where the files are: KVAEs in models/kvae and models/vae, adapters in models/latent_adapters; extra paths count."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..adapters.files import direction_of, weights_of
from ..kvae import KVAE as KVAEModel
from ..kvae import WeightsError
from ..kvae.find import FILE_NAMES, HUB
from ..kvae.paths import file_errors
from ..kvae.signature import same_weights, signature

KVAE, ADAPTERS = "kvae", "latent_adapters"
TINY = "tiny KVAE (included)"
MOST_NAME = 200  # bytes of a name, so that a number and an ending fit into the 255 of file systems
PACK = Path(__file__).parents[1]
ASSETS = PACK / "training" / "tiny" / "assets"

ADDRESS = f"https://huggingface.co/{HUB['KVAE-3D-1.0']}/resolve/main/{FILE_NAMES[0]}"
ADAPTER_NAMES = (
    "adapter_hunyuan_to_kvae3d.safetensors (to decode) and adapter_kvae3d_to_hunyuan.safetensors (to encode)"
)


def register() -> None:
    """Tell ComfyUI of the two folders. Paths that extra_model_paths.yaml gave them stay."""
    for key in (KVAE, ADAPTERS):
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
        paths, _ = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = (paths, {".safetensors"})


def kvae_names() -> list[str]:
    """What the loader offers: models/kvae first, then models/vae, then the tiny KVAE of this pack."""
    beside = [name for name in folder_paths.get_filename_list("vae") if name.endswith(".safetensors")]
    return [*dict.fromkeys([*folder_paths.get_filename_list(KVAE), *beside]), TINY]


def kvae_path(name: str) -> str:
    """The file of that name.

    Raises:
        WeightsError: there is none.
    """
    if name == TINY:
        return str(ASSETS / "tiny_kvae.safetensors")
    path = folder_paths.get_full_path(KVAE, name) or folder_paths.get_full_path("vae", name)
    if path is None:
        folders = folder_paths.get_folder_paths(KVAE) + folder_paths.get_folder_paths("vae")
        fetch = f"python -m training fetch --model KVAE-3D-1.0 --output {folders[-1]}"
        raise WeightsError(
            f"{name}: no such file in {' or '.join(folders)}. KVAE-3D-1.0 is {ADDRESS}: save it there as {name}, or "
            f'run "{fetch}" in {PACK}, and press R; or choose "{TINY}" to try things out.'
        )
    return path


def adapter_names() -> list[str]:
    """The adapter files there are."""
    return folder_paths.get_filename_list(ADAPTERS)


def adapter_path(name: str) -> str:
    """The adapter file of that name.

    Raises:
        WeightsError: there is none.
    """
    path = folder_paths.get_full_path(ADAPTERS, name)
    if path is None:
        raise WeightsError(f"{name}: no such file in {_adapter_folders()}. {_get_adapters()}")
    return path


def find_adapter(source: str, target: str, kvae_name: str, kvae: KVAEModel) -> str | None:
    """The one adapter file that says of itself that it maps source → target, and not for other weights than these of
    the KVAE; None if there is none.

    For the tiny KVAE it is one of those that come with it: no other fits.

    Raises:
        WeightsError: there are several.
    """
    included = [str(path) for path in ASSETS.glob("tiny_*_to_*.safetensors")]
    paths = included if kvae_name == TINY else [adapter_path(name) for name in adapter_names()]
    known = signature(kvae.state_dict())
    found = [path for path in paths if _direction(path) == (source, target) and _fits(path, (source, target), known)]
    if len(found) > 1:
        names = ", ".join(os.path.basename(path) for path in found)
        raise WeightsError(f"{len(found)} adapters map {source} → {target}: {names}; choose one by its name.")
    return found[0] if found else None


def no_adapters(source: str, target: str) -> str:
    """What to say where neither direction is found for a KVAE."""
    text = f"No adapter in {_adapter_folders()} maps {source} → {target} or back for this KVAE. {_get_adapters()}"
    ways = (source, target), (target, source)
    others = [name for name in adapter_names() if _direction(adapter_path(name)) in ways]
    return f"{text} {', '.join(others)}: made for a KVAE with other weights." if others else text


def stamp(*paths: str | None) -> list:
    """Changes when one of the files does."""
    return [path and (path, os.path.getmtime(path), os.path.getsize(path)) for path in paths]


def _direction(path: str) -> tuple[str, str] | None:
    try:
        return direction_of(path)
    except WeightsError:
        return None  # a damaged file is reported when it is chosen, not when another one is looked for


def _fits(path: str, spaces: tuple[str, str], known: tuple[float, ...]) -> bool:
    """Whether an adapter is for a KVAE with these weights, as far as its file says."""
    side = next(name for name in spaces if name.startswith("kvae"))
    try:
        return same_weights(weights_of(path).get(side, ()), known)
    except WeightsError:
        return True  # see above


def latent_path(file: object) -> str:
    """The latent file that a name of the list means: in ComfyUI's input, output or temp folder, and nowhere else.

    Raises:
        WeightsError: there is none. Whether there is such a file elsewhere is not told.
    """
    missing = (
        f"{str(file)[:200]}: no such latent file; put it into ComfyUI's input folder and refresh the page (press R)."
    )
    if not isinstance(file, str):
        raise WeightsError(missing)
    name, folder = folder_paths.annotated_filepath(file)
    folder = os.path.realpath(folder or folder_paths.get_input_directory())
    try:
        path = os.path.realpath(os.path.join(folder, name))
        within = os.path.commonpath([os.path.normcase(folder), os.path.normcase(path)]) == os.path.normcase(folder)
        if within and os.path.isfile(path):
            return path
    except ValueError:  # a NUL in it, or another drive
        pass
    raise WeightsError(missing)


def has_latent(name: str) -> bool:
    """Whether `latent_path` knows it."""
    try:
        latent_path(name)
    except WeightsError:
        return False
    return True


def output_path(prefix: object, ending: str, width: int = 0, height: int = 0) -> tuple[str, str, str]:
    """(path, file, subfolder) of the next file of that prefix in ComfyUI's output folder.

    Args:
        width, height: in pixels, for %width% and %height% in the prefix.

    Raises:
        WeightsError: the prefix makes no name of a file, or its folder cannot be made.
    """
    if not isinstance(prefix, str):
        raise WeightsError(f"filename_prefix is a {type(prefix).__name__}; expected text")
    with file_errors(prefix):
        if any(len(os.fsencode(part)) > MOST_NAME for part in prefix.replace("\\", "/").split("/")):
            raise WeightsError(
                f"filename_prefix: {prefix[:40]}… has a name of over {MOST_NAME} bytes; choose a shorter one"
            )
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    file = f"{name}_{counter:05}_{ending}"
    return os.path.join(folder, file), file, subfolder


def _get_adapters() -> str:
    return (
        f"Put {ADAPTER_NAMES} there, or train your own: python -m training train -h, in {PACK}. "
        f'Without adapters, choose latents "KVAE (native)".'
    )


def _adapter_folders() -> str:
    return " or ".join(folder_paths.get_folder_paths(ADAPTERS))
