"""Run a script of musubi-tuner, unmodified, with KVAE in the place of its VAE.

    python -m training musubi --musubi DIR --kvae VAE --adapter-h2k FILE --adapter-k2h FILE \\
        hv_generate_video.py --dit … --latent_path …

Everything after the script's name goes to the script. Options of this command come before it. Of the script's own
options, --vae may be left out, and --vae_dtype, --vae_tiling and the like have no effect: --dtype and --memory-gb are
in their place. Training on several GPUs works as always: accelerate launch -m training musubi … hv_train_network.py …

KVAE encodes and decodes wherever these scripts load a VAE:
{scripts}.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from ...serving.host_vae import HostVAE
from ...serving.pipeline_vae import PipelineVAE
from ..errors import UserError
from ..options import argument, option
from ..served import ServedOptions, adapter_paths, load_served

PACKAGE = "musubi_tuner"


@dataclass(frozen=True)
class Loader:
    """The one function by which musubi-tuner's scripts for a model load its VAE.

    Attributes:
        space: of the latents.
        module, function: where it is, in musubi-tuner's package.
        parameters: those that the scripts pass by name.
        result: what it returns for a VAE.
    """

    space: str
    module: str
    function: str
    parameters: frozenset[str]
    result: Callable[[PipelineVAE], Any]


HUNYUAN = Loader(
    "hunyuan_video",
    "hunyuan_model.vae",
    "load_vae",
    frozenset({"vae_dtype", "device", "vae_path"}),
    lambda vae: (vae, None, vae.spatial_compression_ratio, vae.temporal_compression_ratio),
)
HUNYUAN_15 = Loader(
    "hunyuan_video_1.5",
    "hunyuan_video_1_5.hunyuan_video_1_5_vae",
    "load_vae_from_checkpoint",
    frozenset({"device", "dtype", "sample_size", "enable_patch_conv"}),
    lambda vae: vae,
)
KANDINSKY = Loader(
    "hunyuan_video", "kandinsky5.models.vae", "build_vae", frozenset({"conf", "vae_dtype"}), lambda vae: vae
)
SCRIPTS = {
    "cache_latents": HUNYUAN,
    "hv_generate_video": HUNYUAN,
    "hv_train_network": HUNYUAN,
    "hv_train": HUNYUAN,
    "hv_1_5_cache_latents": HUNYUAN_15,
    "hv_1_5_generate_video": HUNYUAN_15,
    "hv_1_5_train_network": HUNYUAN_15,
    "kandinsky5_cache_latents": KANDINSKY,
    "kandinsky5_generate_video": KANDINSKY,
    "kandinsky5_train_network": KANDINSKY,
}
__doc__ = __doc__.format(scripts=textwrap.fill(", ".join(SCRIPTS), 120, break_on_hyphens=False))


@dataclass(kw_only=True)
class MusubiConfig(ServedOptions):
    musubi: str = option(..., "folder of musubi-tuner, a checkout with src/musubi_tuner in it", metavar="DIR")
    script: str = argument("name of the script, with or without .py", "SCRIPT")
    args: list[str] = argument("arguments of the script, exactly as it is documented", "ARGS", rest=True)  # noqa: RUF009


def run(config: MusubiConfig) -> int:
    """Run the script's main function; return its exit code.

    Raises:
        UserError: the script is unknown, or musubi-tuner is not there or loads its VAE in another way.
    """
    name = Path(config.script).name.removesuffix(".py")
    if name not in SCRIPTS:
        known = ", ".join(f"{each}.py" for each in SCRIPTS)
        raise UserError(f"{config.script}: KVAE cannot stand in for its VAE; expected one of {known}")
    loader, package = SCRIPTS[name], Path(config.musubi) / "src" / PACKAGE
    path = package / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --musubi must be a checkout of musubi-tuner that has this script")
    sys.path.insert(0, str(package.parent))
    vae = PipelineVAE(_with_progress(load_served(config, loader.space, _ways(config, name))))
    replace_loader(loader, vae)
    script = _import(name)
    own = [] if any(each.partition("=")[0] == "--vae" for each in config.args) else ["--vae", config.kvae]
    sys.argv = [str(path), *config.args, *own]
    return script.main() or 0


def replace_loader(loader: Loader, vae: PipelineVAE) -> None:
    """Let musubi-tuner's function return this VAE, before a script imports it.

    Raises:
        UserError: the function is not where it was, or has other parameters.
    """
    where = f"{PACKAGE}.{loader.module}.{loader.function}"
    module = _import(loader.module)
    found = getattr(module, loader.function, None)
    if found is None:
        raise UserError(f"this musubi-tuner has no {where}; expected version 0.3.4 or near it")
    missing = loader.parameters - set(inspect.signature(found).parameters)
    if missing:
        raise UserError(f"{where} of this musubi-tuner has no {', '.join(sorted(missing))}; expected version 0.3.4")

    def load(*args: Any, device: Any = None, **options: Any) -> Any:
        return loader.result(vae if device is None else vae.to(device))

    setattr(module, loader.function, load)


def _import(name: str) -> ModuleType:
    """A module of musubi-tuner.

    Raises:
        UserError: it is missing, or needs a package that is.
    """
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ImportError as error:
        raise UserError(f"{PACKAGE}.{name} cannot be imported ({error}); install musubi-tuner's requirements") from None


def _ways(config: MusubiConfig, name: str) -> tuple[str, ...]:
    """What the VAE must be able to do. To generate and to train may take both, but what was made is decoded in any
    case: encoding then works if there is an adapter for it."""
    if name.endswith("cache_latents"):
        return ("encode",)
    _, encode = adapter_paths(config, SCRIPTS[name].space, ("encode",))
    return ("decode", "encode") if encode else ("decode",)


def _with_progress(host: HostVAE) -> HostVAE:
    """Show a bar for each encode and decode, in latent frames."""
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not done:
            bars[:] = [tqdm(total=total, desc="KVAE", unit=" latents", leave=False)]
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    host.on_progress = show
    return host
