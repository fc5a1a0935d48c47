"""A KVAE in the place of another model's VAE, as the commands that stand in for one load it.

A command's config has the fields of `ServedOptions`, so that these commands have the same options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adapters.files import load_adapter
from ..adapters.published import PUBLISHED_FILES
from ..adapters.spaces import native_space
from ..kvae import KVAE, load_kvae
from ..serving.dtypes import DTYPES
from ..serving.host_vae import HostVAE
from .errors import UserError
from .options import DEVICE, KVAE_HELP, option
from .vaes import INCLUDED_ADAPTERS, weights_file

AUTO = "auto"
MOST_GB = 1024


@dataclass
class ServedOptions:
    """The options of every command that decodes or encodes with KVAE in the place of another VAE."""

    kvae: str = option("tiny", KVAE_HELP, metavar="VAE")
    adapter_h2k: str = option("", "adapter of the model's latents → KVAE's, for decoding; tiny ones have their own")
    adapter_k2h: str = option("", "adapter of KVAE's latents → the model's, for encoding; tiny ones have their own")
    memory_gb: float = option(
        0.0,
        "GB that may be used in addition to the weights; 0 takes what is free on a GPU, and sets no limit on a CPU. A "
        "smaller budget gives the same result, more slowly",
        least=0,
        most=MOST_GB,
    )
    dtype: str = option(
        AUTO, "precision of the VAE; auto is bf16 on a GPU that has it, else fp32", choices=(AUTO, *DTYPES)
    )
    device: str = option(DEVICE, "device of KVAE and adapters", metavar="DEVICE")


def load_served(
    options: ServedOptions, space: str, ways: Sequence[str] = ("decode", "encode"), kvae: KVAE | None = None
) -> HostVAE:
    """Load a KVAE that serves latents of a space.

    Args:
        space: the name of the space of the latents.
        ways: what it must be able to do; the adapters for anything else are not read.
        kvae: the KVAE of these options, if it is loaded already, for another space.

    Raises:
        UserError: an adapter is missing.
        WeightsError: a file is not what it should be, or does not fit the others.
    """
    kvae = kvae or load_kvae_of(options)
    native = native_space(kvae.config).name
    decode, encode = ("", "") if space == native else adapter_paths(options, space, ways)
    paths = {"decode": (decode, (space, native)), "encode": (encode, (native, space))}
    for way, (path, spaces) in paths.items():
        if space != native and way in ways and not path:
            flag = "--adapter-h2k" if way == "decode" else "--adapter-k2h"
            raise UserError(
                f"{flag} is missing: to {way} {space} latents, {native} needs an adapter {' → '.join(spaces)}. "
                f"{_advice(space, spaces)}"
            )
    adapters = [load_adapter(path, way, options.device) if path else None for path, way in paths.values()]
    host = HostVAE(kvae, *adapters)
    host.planner.limit(options.memory_gb)
    return host


def load_kvae_of(options: ServedOptions) -> KVAE:
    """Load the KVAE of these options, frozen.

    Raises:
        WeightsError: there is none, or the file is not what it should be.
    """
    return load_kvae(weights_file(options.kvae, "kvae"), dtype_of(options), options.device)


def dtype_of(options: ServedOptions) -> torch.dtype:
    """The dtype of KVAE's weights."""
    if options.dtype != AUTO:
        return DTYPES[options.dtype]
    on_gpu = torch.device(options.device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_gpu else torch.float32


def adapter_paths(options: ServedOptions, space: str, ways: Sequence[str]) -> tuple[str, str]:
    """The paths of both adapters (to decode, to encode); empty for one that is not needed or not given.

    Args:
        space: the name of the space of the model's latents.
    """
    included = {way: str(path) for way, path in INCLUDED_ADAPTERS.get((options.kvae, space), {}).items()}
    decode = options.adapter_h2k or included.get("h2k", "")
    encode = options.adapter_k2h or included.get("k2h", "")
    return decode if "decode" in ways else "", encode if "encode" in ways else ""


def _advice(space: str, spaces: tuple[str, str]) -> str:
    """What to do without an adapter between these spaces, for latents of `space`."""
    if spaces in PUBLISHED_FILES.values():
        return "Train one, or try the published ones: python -m training fetch --model adapters"
    tiny = [kvae for kvae, served in INCLUDED_ADAPTERS if served == space]
    if tiny:
        return f"Train one, or try this command with --kvae {' or '.join(tiny)}, which brings its own"
    return f"Give the KVAE that the latents are of: --kvae, a {space}"
