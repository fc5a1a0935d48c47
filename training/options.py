"""Options of commands, declared as fields of dataclasses, with help text and allowed values."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..kvae.foreign import json_text
from ..kvae.paths import reason, write_text
from .errors import UserError
from .runtime.places import check_folder, check_target, shareable

# shared by several commands
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HUNYUAN_HELP = "VAE of HunyuanVideo or HunyuanVideo 1.5: folder, .safetensors file, hub id, or tiny, tiny-1.5"
KVAE_HELP = "KVAE-3D of any kind: folder, .safetensors file, hub id, or tiny, tiny-t4s16"
MOST_SEED = 2**32 - 1
MOST_SIDE = 8192  # pixels; H.264 allows 16384, and two pictures stand side by side
MOST_FRAMES = 10_000  # of a clip, which is held in memory
MOST = 2**31 - 1  # of any other integer


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    writes: str = "",
    metavar: str = "PATH",
) -> Any:
    """A field of a command's config. A default of `...` makes the option required.

    Args:
        choices: the allowed texts; None allows any.
        least, most: bounds of a number, included.
        above, below: bounds of a number, excluded.
        writes: "folder" or "file" for a path that the command writes to. Before any work, `check_options` tries whether
            the command can write there.
        metavar: the name of a text's value in the help.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "writes": writes, "metavar": metavar}
    metadata |= {"least": least, "most": most, "above": above, "below": below}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def argument(help: str, metavar: str, rest: bool = False) -> Any:
    """A field of a command's config that is given without a name: one text, or several if it is a `list[str]`.

    Args:
        rest: whether it takes everything that follows, options too, unchecked.
    """
    nargs = argparse.REMAINDER if rest else "+"
    return field(metadata={"help": help, "choices": None, "writes": "", "metavar": metavar, "nargs": nargs})


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, so that its errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} -h` lists the options")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add an option `--field-name` for each field `field_name`, and the arguments without a name."""
    for each in fields(config):
        if "nargs" in each.metadata:
            nargs = each.metadata["nargs"] if str(each.type) == "list[str]" else None
            parser.add_argument(each.name, metavar=each.metadata["metavar"], help=each.metadata["help"], nargs=nargs)
        elif str(each.type) == "bool":
            parser.add_argument(_flag(each), dest=each.name, action="store_true", help=each.metadata["help"])
        else:
            parser.add_argument(_flag(each), dest=each.name, **_settings(each))


def check_options(config: Any) -> None:
    """Refuse values out of their range and paths that cannot be written, before any work.

    Raises:
        UserError: names the option, its value and what was expected.
    """
    check_values(config)
    for each in fields(config):
        if each.metadata["writes"]:
            check = check_folder if each.metadata["writes"] == "folder" else check_target
            check(_flag(each), Path(getattr(config, each.name)))


def check_values(config: Any) -> None:
    """Refuse values out of their range.

    Raises:
        UserError: names the option, its value and what was expected.
    """
    for each in fields(config):
        value, flag = getattr(config, each.name), _flag(each)
        if isinstance(value, bool) or each.metadata.get("nargs") == argparse.REMAINDER:
            continue
        if isinstance(value, int | float):
            _check_number(flag, value, each.metadata)
            continue
        for text in value if isinstance(value, list) else [value]:
            _check_text(flag, text, each)


def _check_text(flag: str, text: str, each: Field) -> None:
    if "\0" in text:
        raise UserError(f"{flag} is {text!r}; {reason(ValueError())}")
    if not text and each.default != "":
        raise UserError(f"{flag} is empty; expected {each.metadata['help']}")


def _check_number(flag: str, value: float, bounds: Any) -> None:
    least, most, above, below = (bounds[key] for key in ("least", "most", "above", "below"))
    if most is None and isinstance(value, int):
        most = MOST
    parts = [("at least", least), ("at most", most), ("above", above), ("below", below)]
    # NaN is outside of every range
    fits = (
        math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits:
        said = ", ".join(f"{word} {bound:,}" for word, bound in parts if bound is not None and bound != MOST)
        raise UserError(f"{flag} is {_short(value)}; expected {said or 'a finite number'}")


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else f"{value:.4g}"


def _flag(each: Field) -> str:
    return each.metadata["metavar"] if "nargs" in each.metadata else "--" + each.name.replace("_", "-")


def _settings(each: Field) -> dict[str, Any]:
    kind = {"int": _whole_number, "float": float}.get(str(each.type), str)
    settings: dict[str, Any] = {"type": kind, "help": each.metadata["help"], "choices": each.metadata["choices"]}
    settings["metavar"] = (
        None if settings["choices"] else {_whole_number: "N", float: "X", str: each.metadata["metavar"]}[kind]
    )
    if each.default is MISSING:
        return settings | {"required": True}
    if each.default != "":
        settings["help"] += " (default: %(default)s)"
    return settings | {"default": each.default}


def _whole_number(text: str) -> int:
    if len(text) > 30:
        raise argparse.ArgumentTypeError(f"{text[:20]}… is too large a number for any option")
    return int(text)


_whole_number.__name__ = "int"  # argparse shows this name when it refuses a value


def write_config(path: Path, command: str, config: Any) -> None:
    """Write the settings of a command next to its result."""
    write_text(path, json_text({"command": command, **shareable(config)}, indent=2) + "\n")
