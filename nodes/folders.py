"""Find files: KVAEs in models/kvae, models/vae and pipelines in models/diffusion_models, adapters in
models/latent_adapters, and all of them in ComfyUI's extra paths.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePath

import folder_paths

from ..adapters.files import direction_of, weights_of
from ..adapters.published import PUBLISHED_FILES, published_address
from ..adapters.spaces import LatentSpace, native_space
from ..kvae import KVAE as KVAEModel
from ..kvae import WeightsError
from ..kvae.files import Weights, what_is
from ..kvae.find import VAE, says_kvae
from ..kvae.hub import HUB_IDS, WEIGHTS_FILES, hub_address
from ..kvae.load import read_config
from ..kvae.signature import same_weights, signature

KVAE, ADAPTERS, PIPELINES = "kvae", "latent_adapters", "diffusion_models"
PACK = Path(__file__).parents[1]
ASSETS = PACK / "training" / "tiny" / "assets"
INCLUDED = {  # in workflows, these names mean the KVAEs of this pack
    "tiny KVAE (included)": ASSETS / "tiny_kvae.safetensors",
    "tiny KVAE 2.0-t4s16 (included)": ASSETS / "tiny_kvae_t4s16.safetensors",
}


def register() -> None:
    """Register the two folders with ComfyUI. Paths from extra_model_paths.yaml stay."""
    for key in (KVAE, ADAPTERS):
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
        paths, _ = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = (paths, {".safetensors"})


def kvae_names() -> list[str]:
    """The names that Load KVAE offers: of models/kvae, of models/vae, of pipelines, then those in this pack."""
    vae_names = [name for name in _names("vae") if name.endswith(".safetensors")]
    included = (name for name, path in INCLUDED.items() if path.exists())
    return [*dict.fromkeys([*_names(KVAE), *vae_names, *_in_pipelines()]), *included]


def _in_pipelines() -> dict[str, str]:
    """The paths of KVAEs in diffusers' pipelines, by their folder in models/diffusion_models: NAME/vae."""
    files = [PurePath(name) for name in _names(PIPELINES)]
    vaes = [file for file in files if file.name in WEIGHTS_FILES and file.parent.name == VAE]
    paths = {file.parent.as_posix(): folder_paths.get_full_path(PIPELINES, str(file)) for file in vaes}
    return {name: path for name, path in paths.items() if path and says_kvae(Path(path))}


def kvae_path(name: str) -> str:
    """The path of a KVAE file.

    Raises:
        WeightsError: there is no file with that name.
    """
    if name in INCLUDED:
        return _included(name)
    path = folder_paths.get_full_path(KVAE, name) or folder_paths.get_full_path("vae", name)
    path = path or _in_pipelines().get(name)
    if path is None and PurePath(name).name == VAE:
        raise WeightsError(_missing(name, PIPELINES, ""))
    if path is None:
        published = name.removesuffix(".safetensors")
        raise WeightsError(_missing(name, "vae", hub_address(published if published in HUB_IDS else "KVAE-3D-1.0")))
    return path


def _included(name: str) -> str:
    path = INCLUDED[name]
    if not path.exists():
        raise WeightsError(f"{name} is missing: this pack has no {path.name}. Update the pack, or choose another file.")
    return str(path)


def spaces() -> dict[str, LatentSpace]:
    """The spaces of the KVAEs that Load KVAE offers, by their names. Files that are no KVAE are left out."""
    found = {}
    for name in kvae_names():
        with suppress(WeightsError, OSError):  # a broken link has a name, too
            found[name] = _space(*stamp(kvae_path(name)))
    return {name: space for name, space in found.items() if space}


def space_of(name: str) -> LatentSpace:
    """The space of a KVAE's own latents, by the header of its file.

    Raises:
        WeightsError: there is no file with that name, or it is not a KVAE.
        ValueError: the KVAE's grid is not that of a published one.
    """
    return native_space(read_config(kvae_path(name)))


@cache  # pages ask for the schema often, and the file may be on a slow disk
def _space(stamp: tuple[str, float, int]) -> LatentSpace | None:
    try:
        return native_space(read_config(stamp[0]))
    except ValueError:
        return None  # said when it is chosen


def adapter_names() -> list[str]:
    """The names of all adapter files."""
    return _names(ADAPTERS)


def adapter_path(name: str) -> str:
    """The path of an adapter file.

    Raises:
        WeightsError: there is no file with that name.
    """
    path = folder_paths.get_full_path(ADAPTERS, name)
    if path is None:
        raise WeightsError(_missing(name, ADAPTERS, published_address(name) if name in PUBLISHED_FILES else ""))
    return path


def find_adapter(source: str, target: str, kvae_name: str, kvae: KVAEModel) -> str | None:
    """The path of the only adapter file that maps source → target for this KVAE; None if there is none.

    A file that does not name the weights it was made for counts as fitting. For a KVAE of this pack, only the adapters
    of this pack are searched: no other adapter fits.

    Raises:
        WeightsError: several files fit.
    """
    included = [str(path) for path in ASSETS.glob("tiny_*_to_*.safetensors")]
    paths = included if kvae_name in INCLUDED else [adapter_path(name) for name in adapter_names()]
    known = signature(kvae.state_dict())
    found = [path for path in paths if _direction(path) == (source, target) and _fits(path, (source, target), known)]
    if len(found) > 1:
        names = ", ".join(os.path.basename(path) for path in found)
        raise WeightsError(f"{len(found)} adapters map {source} → {target}: {names}. Choose one of them by name.")
    return found[0] if found else None


def no_adapters(source: str, target: str, kvae_name: str, instead: str) -> str:
    """The message if there is an adapter for neither direction.

    Args:
        instead: the other latents that this KVAE can serve, in words.
    """
    if kvae_name in INCLUDED:
        return f"This pack has no adapter {source} → {target} or back for {kvae_name}: choose latents {instead}."
    ways = (source, target), (target, source)
    published = [f"{published_address(name)} ({way[0]} → {way[1]})" for name, way in PUBLISHED_FILES.items()]
    known = f"Download {' and '.join(published)}, save them there, press R: they are for trying, not for pictures. "
    return (
        f"No adapter in {_shown(ADAPTERS)} maps {source} → {target} or back for this KVAE. {_passed_over(ways)}"
        f"{known if ways[0] in PUBLISHED_FILES.values() else 'None is published. '}"
        f"Train your own (docs/adapters.md in this pack), or choose latents {instead}."
    )


def _passed_over(ways: tuple[tuple[str, str], ...]) -> str:
    """Why *auto* takes none of the adapters that are there."""
    other, nameless = [], []
    for name in adapter_names():
        path = adapter_path(name)
        if _direction(path) in ways:
            other.append(f"{name} was made for a KVAE with other weights. ")
        elif _says_nothing(path):
            nameless.append(f"{name} does not say what it maps: choose it by name. ")
    return "".join(other + nameless)


def stamp(*paths: str | None) -> list:
    """A value that changes when one of the files changes."""
    return [path and (path, os.path.getmtime(path), os.path.getsize(path)) for path in paths]


def _direction(path: str) -> tuple[str, str] | None:
    try:
        return direction_of(path)
    except WeightsError:
        return None  # a damaged file is reported when it is chosen, not while another is searched


def _says_nothing(path: str) -> bool:
    """Whether this is an adapter whose file does not say what it maps, such as a published one under another name."""
    try:
        return direction_of(path) is None and what_is(Weights(path).shapes) == "a latent adapter"
    except WeightsError:
        return False  # as in _direction


def _fits(path: str, spaces: tuple[str, str], known: tuple[float, ...]) -> bool:
    """Whether an adapter may be for a KVAE with these weights, by what its file says."""
    side = next(name for name in spaces if name.startswith("kvae"))
    try:
        return same_weights(weights_of(path).get(side, ()), known)
    except WeightsError:
        return True  # as in _direction


def _names(key: str) -> list[str]:
    """The names of the files in the folders of that key. A folder may have been deleted while ComfyUI runs."""
    try:
        return folder_paths.get_filename_list(key)
    except FileNotFoundError:
        folder_paths.filename_list_cache.pop(key, None)
        return folder_paths.get_filename_list(key)


def _missing(name: str, key: str, address: str) -> str:
    """The message for a file that is not there, with the address to download it from, if it is known."""
    if not address:
        return f"{name} is not in {_shown(key)}. Save it there, press R, or choose another file."
    return f"{name} is not in {_shown(key)}. Download {address}, save it there under this name, press R."


def _shown(key: str) -> str:
    """The folder of that key, as users know it: relative to ComfyUI's, if it is in there."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(key)]
    folder = next((each for each in folders if each.name == key), folders[0])  # diffusion_models has unet before it
    inside = Path(folder_paths.base_path)
    return folder.relative_to(inside).as_posix() if folder.is_relative_to(inside) else str(folder)
