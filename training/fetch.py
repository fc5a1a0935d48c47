"""Download a KVAE or an adapter from the Hugging Face hub, or the published adapters from GitHub, into a folder.

    python -m training fetch --model KVAE-3D-1.0 --output ComfyUI/models/vae
    python -m training fetch --model adapters --output ComfyUI/models/latent_adapters

Prints the size first. The same command continues an interrupted download. HF_HOME (the hub's cache and token),
HF_ENDPOINT and HF_HUB_OFFLINE are respected.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from ..adapters.published import PUBLISHED_FILES, SHA256, SIZE, published_address
from ..kvae import WeightsError
from ..kvae.files import Weights, what_is
from ..kvae.hub import HUB_IDS, WEIGHTS_FILES, hub_client, hub_reason
from ..kvae.load import official_key
from ..kvae.paths import file_errors, written_whole
from .download import download_rest, hash_of, keep, open_partial
from .errors import UserError
from .options import option

ADAPTERS = "adapters"
MODELS = f"{', '.join(HUB_IDS)}, {ADAPTERS} (the two published ones), or a file on the hub: owner/name/file.safetensors"


@dataclass
class FetchConfig:
    model: str = option(..., MODELS, metavar="MODEL")
    output: str = option(
        ..., "folder to save the file in: ComfyUI/models/vae, or ComfyUI/models/latent_adapters", writes="folder"
    )


def run(config: FetchConfig) -> int:
    """Download one file, or the published adapters, unless they exist already; return 0."""
    folder = Path(config.output)
    if config.model == ADAPTERS:
        for name in PUBLISHED_FILES:
            if is_wanted(folder / name):
                download_adapter(name, folder / name)
        return 0
    repository, file = parse_model(config.model)
    target, url = folder / local_name(repository, file), _url(repository, file)
    if is_wanted(target):
        _report(target, from_cache(repository, file, target) or download(url, target))
    return 0


def is_wanted(target: Path) -> bool:
    """Whether there is no such file yet.

    Raises:
        UserError: it is a folder.
        WeightsError: its folder cannot be read.
    """
    with file_errors(target):
        there, is_folder = target.exists(), target.is_dir()
    if is_folder:
        raise UserError(f"{target}: this is a folder; choose another --output")
    if there:
        print(f"{target} already exists; delete it to download it again")
    return not there


def parse_model(model: str) -> tuple[str, str]:
    """The repository and the file in it, from the name of a published model, from owner/name/path/file.safetensors, or
    from the file's address on the hub.

    Raises:
        UserError: `model` is not any of the three.
    """
    if model in HUB_IDS:
        return HUB_IDS[model], WEIGHTS_FILES[0]
    name = r"\w[\w.-]*"  # never ".."
    found = re.fullmatch(
        rf"(?:https://huggingface\.co/)?({name}/{name})/(?:resolve/main/)?((?:{name}/)*{name}\.safetensors)",
        model,
        re.ASCII,
    )
    if not found:
        raise UserError(f"--model {model}: expected {MODELS}")
    return found[1], found[2]


def local_name(repository: str, file: str) -> str:
    """The name to save a file under: its own, or the repository's if its own is generic (model.safetensors)."""
    name = Path(file).name
    return f"{repository.rpartition('/')[2]}.safetensors" if name in WEIGHTS_FILES else name


def from_cache(repository: str, file: str, target: Path) -> str | None:
    """Link or copy the file from the hub's cache under HF_HOME to `target`.

    Returns:
        The kind of file; None if the cache does not have it.
    """
    cached = hub_client().try_to_load_from_cache(repository, file)
    if not isinstance(cached, str):
        return None
    print(f"{repository}/{file}: from the cache, {cached}")
    kind = kind_of(Path(cached))
    _make_folder_of(target)
    try:
        os.link(os.path.realpath(cached), target)
    except OSError:  # another disk, or a file system without links
        with written_whole(target) as partial:
            shutil.copyfile(cached, partial)
    return kind


def download(url: str, target: Path) -> str:
    """Download a file of the hub to `target`, continuing what an earlier run began.

    Returns:
        The kind of file.

    Raises:
        UserError: the hub cannot be reached or has no such file, the disk is too small, or the file is damaged.
        WeightsError: the file cannot be written.
    """
    about = _metadata(url, target)
    return _download(url, target, about.etag, about.size)


def download_adapter(name: str, target: Path) -> None:
    """Download a published adapter to `target`, and compare its hash. GitHub gets no token.

    Raises:
        UserError, WeightsError: as `download`.
    """
    url = published_address(name)
    if hub_client().constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set; save {url} as {target} by hand")
    _report(target, _download(url, target, SHA256[name], SIZE, token=False))


def _download(url: str, target: Path, tag: str, size: int, token: bool = True) -> str:
    _make_folder_of(target)
    with open_partial(target, tag, size) as file:
        have = file.tell()
        print(f"{url}: {_amount(size)}" + f", {_amount(have)} of it already downloaded" * (have > 0))
        with file_errors(target):
            free = shutil.disk_usage(target.parent).free
        if size - have > free:
            raise UserError(f"{target.parent}: {_amount(free)} free; {_amount(size - have)} needed")
        download_rest(url, file, size, target.name, token)
        kind = _check(url, file, tag)
        keep(file, target)
    return kind


def _make_folder_of(target: Path) -> None:
    """Make the folder of a file. Called once the file is known to exist, so that a wrong name leaves no folder."""
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e3:,.0f} KB"


def _report(target: Path, kind: str) -> None:
    print(f"→ {target}: {kind}")


def kind_of(path: Path) -> str:
    """The kind of file, in words, by the names of its tensors.

    Raises:
        UserError: the file is neither a KVAE-3D nor a latent adapter.
        WeightsError: the file is not safetensors.
    """
    kind = what_is(map(official_key, Weights(path).shapes))
    if not kind.startswith(("a KVAE-3D", "a latent adapter")):
        raise UserError(f"{path}: this is {kind}; expected a KVAE-3D VAE or a latent adapter")
    return kind


def _url(repository: str, file: str) -> str:
    try:
        return hub_client().hf_hub_url(repository, file)
    except ValueError as error:
        raise UserError(f"--model {repository}/{file}: {hub_reason(error)}") from None


def _metadata(url: str, target: Path) -> Any:
    """The size and the tag that the hub gives for a file, as its HfFileMetadata."""
    hub = hub_client()
    try:
        about = hub.get_hf_file_metadata(url)
    except hub.errors.OfflineModeIsEnabled:
        raise UserError(
            f"HF_HUB_OFFLINE is set, and the hub's cache does not have the file; save {url} as {target} by hand"
        ) from None
    except Exception as error:  # which HTTP library raises it depends on huggingface_hub's version
        raise UserError(f"{url}: {hub_reason(error)}; check the name and the network") from None
    if not about.size or about.size < 0 or not about.etag:
        raise UserError(f"{url}: the hub does not say how large the file is; save it as {target} by hand")
    return about


def _check(url: str, file: BufferedRandom, etag: str) -> str:
    """The kind of a complete download. Delete it if it is damaged, or neither a KVAE-3D nor an adapter."""
    found = hash_of(file, etag)
    try:
        if found not in (etag, None):
            raise UserError(f"{url}: the downloaded file is damaged; run the same command again")
        kind = kind_of(Path(file.name))
    except (UserError, WeightsError) as error:
        file.truncate(0)
        raise UserError(str(error).replace(file.name, url)) from None
    if found is None:
        print("the hub gives no hash of this file; only its size was compared")
    return kind
