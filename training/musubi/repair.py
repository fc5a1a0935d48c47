"""Make the caches anew in which `check-cache` found a fault that this mends."""

from __future__ import annotations

from ...serving.architectures import Architecture
from ..errors import UserError
from .buckets import bucket_chooser
from .cache import Caching, load_caching
from .cache_faults import SHORTS, CacheFile, base_of, grids_of, short_of
from .cache_files import MADE_HERE
from .config import Dataset
from .encoders import EncoderOptions
from .folder_faults import Folder
from .plan import FITS, MISSING, Plan, Wanted, make_plan

_SAME = (MADE_HERE, "kvae_adapter_sha256")  # in the metadata of all caches of a folder


def plans_for(folder: Folder, dataset: Dataset) -> dict[Architecture, Plan]:
    """What `cache` would make of a dataset, for each model that has files in the folder.

    Raises:
        UserError, WeightsError: as `make_plan`.
    """
    names = {*folder.caches, *(fault.file for fault in folder.faults)}
    shorts = sorted({short_of(name) for name in names} & SHORTS.keys())
    return {SHORTS[short]: make_plan(dataset, _wanted(folder, dataset, SHORTS[short])) for short in shorts}


def _wanted(folder: Folder, dataset: Dataset, architecture: Architecture) -> Wanted:
    """Caches as most in the folder are: for image to video or not, of stretched frames or not."""
    choose = bucket_chooser(dataset)
    caches = [file for file in folder.caches.values() if file.architecture == architecture]
    first_frame = sum("siglip" in map(base_of, file.header.shapes) for file in caches)
    stretched = sum(_is_stretched(file, *choose((file.name.width, file.name.height))) for file in caches)
    return Wanted(architecture, 2 * first_frame > len(caches), 2 * stretched > len(caches), {})


def _is_stretched(file: CacheFile, width: int, height: int) -> bool:
    grid, (down, _, *stretched) = file.grid, grids_of(width, height, file.architecture)
    return grid is not None and grid[1:] != down and grid[1:] in stretched


def make_anew(folder: Folder, plans: dict[Architecture, Plan], options: EncoderOptions, image_encoder: str) -> set[str]:
    """Encode and write the caches that have a fault which this mends. All others stay as they are.

    Args:
        image_encoder: SigLIP's vision model, for caches that train image to video.

    Returns:
        the names of the files that were written.

    Raises:
        UserError: an option is missing, or the encoder is not that of the other caches.
        WeightsError: a VAE cannot be read, or a cache cannot be written.
    """
    names = {fault.file for fault in folder.faults if fault.again}
    made: set[str] = set()
    for architecture, plan in plans.items():
        chosen = [target for path, target in plan.targets.items() if path.name in names]
        if not chosen:
            continue
        caching = _caching(_wanted(folder, plan.dataset, architecture), options, image_encoder)
        _check_same_encoder(folder, caching.wanted)
        for target in plan.targets.values():
            target.state = FITS
        for target in chosen:
            target.state, target.texts = MISSING, caching.wanted.made_by | target.texts
        caching.run([plan])
        made |= {target.path.name for target in chosen if target.item not in plan.failed}
    return made


def _caching(wanted: Wanted, options: EncoderOptions, image_encoder: str) -> Caching:
    if wanted.i2v and not image_encoder:
        raise UserError("--image-encoder is missing: the caches here train image to video, and hold SigLIP's features")
    return load_caching(options, wanted.architecture, wanted.nabla, image_encoder if wanted.i2v else "")


def _check_same_encoder(folder: Folder, wanted: Wanted) -> None:
    """Refuse to mix latents of two encoders. What encoded caches of musubi-tuner is not known."""
    for file in folder.sound():
        said = {key: file.header.metadata.get(key) for key in _SAME}
        if said[MADE_HERE] is not None and said != {key: wanted.made_by[key] for key in _SAME}:
            names = file.header.metadata.get("kvae_vae", ""), file.header.metadata.get("kvae_adapter", "")
            raise UserError(
                f"{file.path.name} was made with {' and '.join(filter(None, names))[:120]}; expected the encoder "
                "of the options, as a folder needs one encoder: give the same, or make all anew with cache --replace"
            )
