"""Commands are dataclasses: a field is an option, its metadata the help text, its default the default."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any

import torch

from ..kvae.paths import write_text

# of options that several commands have
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HUNYUAN_HELP = "VAE of HunyuanVideo or HunyuanVideo 1.5: folder, .safetensors file, hub id, or tiny"
KVAE_HELP = "KVAE-3D of any kind: folder, .safetensors file, hub id, or tiny"


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a command's config. A default of `...` makes the option required."""
    metadata = {"help": help, "choices": choices}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """An option `--like-this` for each field `like_this`."""
    for each in fields(config):
        parser.add_argument("--" + each.name.replace("_", "-"), dest=each.name, **_settings(each))


def _settings(each: Field) -> dict[str, Any]:
    kind = {"int": int, "float": float}.get(str(each.type).split(" ")[0], str)
    settings: dict[str, Any] = {"type": kind, "help": each.metadata["help"], "choices": each.metadata["choices"]}
    settings["metavar"] = None if settings["choices"] else {int: "N", float: "X", str: "PATH"}[kind]
    if each.default is MISSING:
        return settings | {"required": True}
    if each.default not in (None, ""):
        settings["help"] += " (default: %(default)s)"
    return settings | {"default": each.default}


def write_config(path: Path, command: str, config: Any) -> None:
    """The settings of a result, beside the result."""
    write_text(path, json.dumps({"command": command, **asdict(config)}, indent=2, ensure_ascii=False) + "\n")
