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

from ..kvae import WeightsError
from ..kvae.files import Weights, what_is
from ..kvae.find import FILE_NAMES, HUB
from ..kvae.load import official_key
from ..kvae.paths import sha256_of
from .errors import UserError
from .options import option

KNOWN = {name: (repository, "model.safetensors") for name, repository in HUB.items()}


@dataclass
class FetchConfig:
    model: str = option(..., f"{', '.join(KNOWN)}, or a file on the hub: owner/name/file.safetensors")
    output: str = option(..., "folder to put it in: ComfyUI/models/vae, or ComfyUI/models/latent_adapters")


def run(config: FetchConfig) -> int:
    """Download one file; returns 0."""
    repository, file = source_of(config.model)
    target = Path(config.output) / name_of(repository, file)
    if target.is_file():
        print(f"{target} is there already; delete it to download it again")
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = from_cache(repository, file, target) or download(repository, file, target)
    try:
        kind = what_is(map(official_key, Weights(partial).shapes))
        if not kind.startswith(("a KVAE-3D", "a latent adapter")):
            raise UserError(f"{config.model}: this is {kind}; expected a KVAE-3D VAE or a latent adapter")
        os.replace(partial, target)
    except (UserError, WeightsError):
        partial.unlink()
        raise
    print(f"→ {target}: {kind}")
    return 0


def source_of(model: str) -> tuple[str, str]:
    """(repository, file in it) of a known name, or of owner/name/path/file.safetensors.

    Raises:
        UserError: it is neither.
    """
    if model in KNOWN:
        return KNOWN[model]
    found = re.fullmatch(
        r"(?:https://huggingface\.co/)?([\w-]+/[\w.-]+)/(?:resolve/main/)?([\w./-]+\.safetensors)", model
    )
    if not found or ".." in model:
        raise UserError(f"--model {model}: expected {', '.join(KNOWN)}, or owner/name/file.safetensors")
    return found[1], found[2]


def name_of(repository: str, file: str) -> str:
    """The name to save a file under: its own, or that of its repository where its own says nothing."""
    name = Path(file).name
    return f"{repository.rpartition('/')[2]}.safetensors" if name in FILE_NAMES else name


def from_cache(repository: str, file: str, target: Path) -> Path | None:
    """The file out of the hub's cache under HF_HOME, linked where that can be, beside the target; None if not there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    if not isinstance(cached, str):
        return None
    print(f"{repository}/{file}: from the cache, {cached}")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(cached), partial)
    except OSError:  # another disk, or one without links
        shutil.copyfile(cached, partial)
    return partial


def download(repository: str, file: str, target: Path) -> Path:
    """The file from the hub, beside the target; what an earlier call left of it is not downloaded again.

    Raises:
        UserError: the hub cannot be reached or has no such file, the disk is too small, or what came is damaged.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository, file)
    # those of the HTTP library, which is not the same in every version
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        about = get_hf_file_metadata(url)
    except OfflineModeIsEnabled:
        raise UserError(
            f"HF_HUB_OFFLINE is set and the cache does not hold {repository}/{file}; save {url} as {target} by hand"
        ) from None
    except failures as error:
        raise UserError(f"{url}: {_first_line(error)}; check the name and the network") from None
    if not about.size or not about.etag:
        raise UserError(f"{url}: the hub does not say how large the file is; save it as {target} by hand")
    partial = target.with_name(f"{target.name}.{about.etag[:12]}.partial")
    have = partial.stat().st_size if partial.exists() else 0
    print(f"{repository}/{file}: {about.size / 1e9:.2f} GB" + (f", of which {have / 1e9:.2f} are here" if have else ""))
    free = shutil.disk_usage(target.parent).free
    if about.size - have > free:
        raise UserError(f"{target.parent}: {free / 1e9:.2f} GB free; {(about.size - have) / 1e9:.2f} are needed")
    try:
        with partial.open("ab") as stream:
            http_get(
                url,
                stream,
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=about.size,
                displayed_filename=target.name,
            )
    except failures as error:
        raise UserError(f"{url}: {_first_line(error)}; the same command goes on from here") from None
    if len(about.etag) == 64 and sha256_of(partial) != about.etag:  # of a large file the hub's tag is its hash
        partial.unlink()
        raise UserError(f"{url}: what came is damaged; the same command downloads it again")
    return partial


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
