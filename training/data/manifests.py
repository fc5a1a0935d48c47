"""`manifest.json`: how the pairs of a folder were made, by one extraction or by several side by side."""

from __future__ import annotations

import json
from pathlib import Path

from ...adapters.spaces import LatentSpace, latent_space
from ...adapters.weights import VAEWeights
from ...kvae.foreign import build, parse_object
from ...kvae.paths import read_text, write_text
from ...kvae.signature import same_weights
from ..errors import UserError
from .pairs import pairs_under
from .walk import files_under

MANIFEST = "manifest.json"
VAES = ("hunyuan_vae", "kvae")  # in a manifest


def find_manifests(root: str | Path) -> list[Path]:
    """The manifests of a folder and of the folders in it: extractions of several sizes may lie side by side."""
    return sorted(path for path in files_under(root) if path.name == MANIFEST) if Path(root).is_dir() else []


def extractions(root: str | Path) -> list[str]:
    """The inner folders that have their own manifests."""
    folders = (path.parent.relative_to(root).as_posix() for path in find_manifests(root))
    return [folder for folder in folders if folder != "."]


def all_manifests(root: str | Path) -> dict[str, dict]:
    """The manifests of a folder (".") and of the folders in it, by folder.

    Raises:
        UserError: a manifest is unreadable.
    """
    return {path.parent.relative_to(root).as_posix(): own_manifest(path.parent) for path in find_manifests(root)}


def read_manifest(root: str | Path) -> dict:
    """The settings of a folder's pairs, and their VAEs by hash; empty for a folder without a manifest.

    For several extractions side by side, "settings" holds the settings of each, by folder.

    Raises:
        UserError: a manifest is unreadable, or the folders in it were made with different VAEs.
    """
    found = all_manifests(root)
    if set(found) <= {"."}:
        return found.get(".", {})
    (first, manifest), *others = found.items()
    for folder, other in others:
        for key in VAES:
            if not same_vae(other[key], manifest[key]):
                one, two = without_signature(manifest[key]), without_signature(other[key])
                raise UserError(
                    f"{root}: {first} and {folder} hold pairs of different VAEs "
                    f"({key}: {one}, {two}); an adapter is trained on pairs of the same two VAEs"
                )
    return manifest | {"settings": {folder: each["settings"] for folder, each in found.items()}}


def own_manifest(folder: Path) -> dict:
    """The manifest of one extraction's folder, without the folders in it; empty if there is none.

    Raises:
        UserError: it is unreadable.
    """
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = parse_object(read_text(path))
        if not isinstance(manifest["settings"], dict):
            raise ValueError("its settings are not an object")
        for key in VAES:
            if not all(isinstance(manifest[key][each], str) for each in ("space", "sha256")):
                raise ValueError(f"its {key} has no space and sha256")
        weights_of(manifest)  # or a ValueError
        return {key: manifest[key] for key in ("settings", *VAES)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the manifest of an extraction ({error}); put the right manifest there, or use a new folder"
        ) from None


def same_vae(one: dict, other: dict) -> bool:
    """Whether two entries of manifests name the same VAE: the same file, or the same weights in two files."""
    if one["space"] != other["space"]:
        return False
    if one["sha256"] == other["sha256"]:
        return True
    signatures = [each["signature"] for each in (one, other) if each.get("signature")]
    return len(signatures) == 2 and same_weights(*signatures)


def weights_of(manifest: dict) -> dict[str, VAEWeights]:
    """The weights of the VAEs in a manifest, by latent space, as adapter files name them.

    Raises:
        ValueError: an entry is malformed.
    """
    return {manifest[key]["space"]: build(VAEWeights, manifest[key]) for key in VAES if key in manifest}


def without_signature(entry: dict) -> dict:
    """The parts of a manifest's entry that people read."""
    return {key: value for key, value in entry.items() if key != "signature"}


def read_spaces(root: str | Path) -> tuple[LatentSpace, LatentSpace]:
    """The latent spaces of z_h and z_k in a folder; without a manifest, those of the published pairs.

    Raises:
        UserError: a space is unknown.
    """
    manifest = read_manifest(root)
    if not manifest:
        return latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")
    try:
        return latent_space(manifest["hunyuan_vae"]["space"]), latent_space(manifest["kvae"]["space"])
    except ValueError as error:
        raise UserError(f"{root}/{MANIFEST}: {error}") from None


def _other(key: str) -> str:
    return f"other {key}" if key == "settings" else f"another {key}"


class ExtractionManifest:
    """The manifest of a folder to extract into. All pairs of a folder have the same settings and the same two VAEs.

    Args:
        described: the content of the manifest.

    Raises:
        UserError: the folder holds pairs made with other settings or VAEs.
    """

    def __init__(self, folder: Path, described: dict):
        self.path, self.described = folder / MANIFEST, described
        self.written = False
        theirs = own_manifest(folder)
        if not self._has_pairs():
            return  # an extraction that made no pair left the manifest, if there is one
        if not theirs:
            raise UserError(f"{folder}: holds pairs and does not say how they were made; choose another --output-root")
        for key in theirs:
            same = same_vae(theirs[key], described[key]) if key in VAES else theirs[key] == described[key]
            if not same:
                before, now = without_signature(theirs[key]), without_signature(described[key])
                raise UserError(
                    f"{folder}: holds pairs made with {_other(key)}: {before}; now {now}. Choose another --output-root"
                )

    def write(self, more: dict | None = None) -> None:
        """Write the manifest."""
        write_text(self.path, json.dumps(self.described | (more or {}), indent=2) + "\n")
        self.written = True

    def write_first(self) -> None:
        """Write the manifest once, before the first pair, so that no pair is ever without it."""
        if not self.written:
            self.write()

    def withdraw(self) -> None:
        """Delete the manifest if the folder has no pair."""
        if not self._has_pairs() and own_manifest(self.path.parent):
            self.path.unlink()

    def _has_pairs(self) -> bool:
        """Whether the folder has pairs, apart from those of extractions into inner folders."""
        folder = self.path.parent
        inner = [folder / each for each in extractions(folder)]
        return any(not any(each in path.parents for each in inner) for path in pairs_under(folder))
