"""Convert a LoRA of HunyuanVideo 1.5 for other programs: diffusers, peft, musubi-tuner, ComfyUI.

    python -m training vfl-export LORA --output FOLDER [--format comfyui]

LORA is a file of any of these programs, or the folder of an adapter of peft. Names, ranks and alphas are found in it.
FOLDER gets NAME.comfyui.safetensors, NAME.diffusers.safetensors, NAME.musubi.safetensors, and the folder NAME.peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...kvae.files import Weights
from ...kvae.paths import sha256_of
from ..errors import UserError, printable
from ..options import argument, option
from .lora_files import FORMATS, lora_path, write_lora
from .lora_reading import lora_file, read_lora

ALL = "all"
MADE_OF = "kvae_made_of"  # in the metadata: the sha256 of the file that a conversion was made of


@dataclass
class VflExportConfig:
    lora: str = argument("LoRA to convert: a file, or the folder of an adapter of peft", "LORA")
    output: str = option(..., "folder to write to", writes="folder")
    format: str = option(ALL, "whose files to write", choices=(ALL, *FORMATS))


def run(config: VflExportConfig) -> int:
    """Write the files that are missing; return the exit code."""
    source = lora_file(Path(config.lora))
    digest, folder, name = sha256_of(source), Path(config.output), _name(Path(config.lora))
    formats = list(FORMATS) if config.format == ALL else [config.format]
    left = [format for format in formats if not _is_there(lora_path(folder, name, format), digest)]
    if left:
        found = read_lora(source)
        print(f"{printable(config.lora)}: {found.about()}")
        write_lora(folder, name, found.layers, left, {MADE_OF: digest})
    for format in formats:
        path = lora_path(folder, name, format)
        said = f"{path.stat().st_size / 1e6:,.1f} MB" if format in left else "already there"
        print(f"{printable(str(path))}: {said}")
    return 0


def _name(path: Path) -> str:
    """The name of the results: that of the LoRA, without the ending that an earlier conversion gave it."""
    name = path.name if path.is_dir() else path.stem
    return next((name.removesuffix(f".{format}") for format in FORMATS if name.endswith(f".{format}")), name)


def _is_there(path: Path, digest: str) -> bool:
    """Whether a result is there, made of the same file.

    Raises:
        UserError: something else has its name.
    """
    if not path.exists():
        return False
    if Weights(path).metadata.get(MADE_OF) != digest:
        raise UserError(f"{path}: is there already, and not made of this LoRA; choose another --output")
    return True
