"""Download a KVAE or an adapter from the Hugging Face hub into a folder; nothing else here downloads unasked.

    python -m training fetch --model KVAE-3D-1.0 --output ComfyUI/models/vae

Says the size first. An interrupted download goes on where it was. HF_HOME (its cache and token), HF_ENDPOINT and
HF_HUB_OFFLINE are respected.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kvae import WeightsError
from ..kvae.files import Weights, what_is
from ..kvae.hub import HUB_IDS, WEIGHTS_FILES
from ..kvae.load import official_key
from ..kvae.paths import file_errors, written_whole
from .errors import UserError
from .options import option
from .partial import Partial, hub_hash

KNOWN = {name: (repository, WEIGHTS_FILES[0]) for name, repository in HUB_IDS.items()}
CHUNK_BYTES = 2**20  # of the hub's client; it keeps nothing of a chunk that is broken off
MOST_NAME = 200  # letters of a file's name; a file system takes 255 bytes, and ours of parts are longer


@dataclass
class FetchConfig:
    model: str = option(..., f"{', '.join(KNOWN)}, or a file on the hub: owner/name/file.safetensors")
    output: str = option(
        ..., "folder to put it in: ComfyUI/models/vae, or ComfyUI/models/latent_adapters", writes="folder"
    )


def run(config: FetchConfig) -> int:
    """Download one file; returns 0."""
    repository, file = source_of(config.model)
    target = Path(config.output) / name_of(repository, file)
    if target.is_file():
        print(f"{target} is there already; delete it to download it again")
        return 0
    if target.is_dir():
        raise UserError(f"{target}: this is a folder; expected a file, or nothing yet: choose another --output")
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    kind = from_cache(repository, file, target) or download(repository, file, target)
    print(f"→ {target}: {kind}")
    return 0


def source_of(model: str) -> tuple[str, str]:
    """(repository, file in it) of a known name, or of owner/name/path/file.safetensors.

    Raises:
        UserError: it is neither.
    """
    if model in KNOWN:
        return KNOWN[model]
    name = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"  # as the hub has them
    found = re.fullmatch(
        rf"(?:https://huggingface\.co/)?({name}/{name})/(?:resolve/main/)?((?:[\w.-]+/)*[\w.-]+\.safetensors)",
        model,
        re.ASCII,
    )
    good = found and len(found[1]) <= 96 and "--" not in found[1] and ".git" not in found[1]
    if not (found and good) or ".." in model or "/./" in model or len(Path(model).name) > MOST_NAME:
        raise UserError(f"--model {model}: expected {', '.join(KNOWN)}, or owner/name/file.safetensors")
    return found[1], found[2]


def name_of(repository: str, file: str) -> str:
    """The name to save a file under: its own, or that of its repository where its own says nothing."""
    name = Path(file).name
    return f"{repository.rpartition('/')[2]}.safetensors" if name in WEIGHTS_FILES else name


def from_cache(repository: str, file: str, target: Path) -> str | None:
    """Put the file out of the hub's cache under HF_HOME in its place, linked where that can be; None if not there.

    Returns:
        what it is.
    """
    hub = _hub()
    cached = hub.try_to_load_from_cache(repository, file)
    if not isinstance(cached, str):
        return None
    print(f"{repository}/{file}: from the cache, {cached}")
    kind = _kind(Path(cached))
    try:
        os.link(os.path.realpath(cached), target)
    except OSError:  # another disk, or one without links
        with written_whole(target) as partial:
            shutil.copyfile(cached, partial)
    return kind


def download(repository: str, file: str, target: Path) -> str:
    """The file from the hub; what an earlier call left of it is not downloaded again.

    Returns:
        what it is.

    Raises:
        UserError: the hub cannot be reached or has no such file, the disk is too small, or what came is damaged.
    """
    url, about = _about(repository, file, target)
    with Partial(target, about.etag, about.size) as partial:
        have = partial.size
        print(
            f"{repository}/{file}: {about.size / 1e9:.2f} GB" + (f", of which {have / 1e9:.2f} are here" * (have > 0))
        )
        with file_errors(target):
            free = shutil.disk_usage(target.parent).free
        if about.size - have > free:
            raise UserError(f"{target.parent}: {free / 1e9:.2f} GB free; {(about.size - have) / 1e9:.2f} are needed")
        _get(url, partial, target.name)
        try:
            found = hub_hash(partial.path, about.etag)
            if partial.size != about.size or found not in (about.etag, None):
                raise UserError(f"{url}: what came is damaged; the same command downloads it again")
            kind = _kind(partial.path)
        except (UserError, WeightsError) as error:
            partial.discard()
            raise UserError(str(error).replace(str(partial.path), f"{repository}/{file}")) from None
        if found is None:
            print("the hub gives no hash of this file; only its size was compared")
        partial.keep()
    return kind


def _about(repository: str, file: str, target: Path) -> tuple[str, Any]:
    """The file's address, and the size and the tag that the hub gives."""
    hub = _hub()
    url = f"{repository}/{file}"
    try:
        url = hub.hf_hub_url(repository, file)
        about = hub.get_hf_file_metadata(url)
    except hub.errors.OfflineModeIsEnabled:
        raise UserError(
            f"HF_HUB_OFFLINE is set and the cache does not hold {repository}/{file}; save {url} as {target} by hand"
        ) from None
    except Exception as error:  # the hub's HTTP library, and its errors, are not the same in every version
        raise UserError(f"{url}: {_first_line(error)}; check the name and the network{_endpoint()}") from None
    if not about.size or about.size < 0 or not about.etag:
        raise UserError(f"{url}: the hub does not say how large the file is; save it as {target} by hand")
    return url, about


def _get(url: str, partial: Partial, name: str) -> None:
    """Append what is missing."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        http_get(
            url,
            partial,  # type: ignore[arg-type]
            resume_size=partial.size,
            headers=build_hf_headers(),
            expected_size=partial.most,
            displayed_filename=name,
        )
    except (UserError, ValueError) as error:
        if partial.refusal:  # the reader's own word, whatever the library made of it
            raise partial.refusal from None
        raise UserError(f"{url}: {_first_line(error)}") from None
    except Exception as error:
        if partial.refusal:
            raise partial.refusal from None
        raise UserError(f"{url}: {_first_line(error)}; the same command goes on from here") from None


def _hub() -> Any:
    """The package huggingface_hub, told to send nothing but what is asked for, and to hand over small chunks."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, file_download  # noqa: F401
    except ImportError:
        raise UserError("fetch needs the package huggingface_hub; install it, or save the file by hand") from None
    except ValueError as error:  # it reads its settings as it is imported
        raise UserError(f"a variable HF_… is set to what huggingface_hub does not take ({error})") from None
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    return huggingface_hub


def _kind(path: Path) -> str:
    """What is in a file.

    Raises:
        UserError, WeightsError: it is nothing for this pack.
    """
    kind = what_is(map(official_key, Weights(path).shapes))
    if not kind.startswith(("a KVAE-3D", "a latent adapter")):
        raise UserError(f"{path}: this is {kind}; expected a KVAE-3D VAE or a latent adapter")
    return kind


def _endpoint() -> str:
    return " (HF_ENDPOINT is set)" if os.environ.get("HF_ENDPOINT") else ""


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
