"""The command line: one entry point, with a subcommand for each task."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from importlib import import_module

import torch

from ..kvae import WeightsError
from ..kvae.paths import reason
from ..serving.memory import is_out_of_memory
from .errors import UserError, printable
from .options import Parser, add_options, check_options
from .runtime.processes import leave

INTERRUPTED = 130
COMMANDS = {  # name → module, function in it, summary
    "adapters": ("pipeline.adapters", "run", "make both adapters from a folder of videos: all of the next stages"),
    "extract": ("data.extract", "run", "extract latent pairs from videos"),
    "pack": ("data.packing", "run_pack", "pack latent pairs into memory-mapped shards"),
    "unpack": ("data.packing", "run_unpack", "unpack shards into latent pairs"),
    "train": ("adapters.train", "run", "train both adapters on latent pairs"),
    "evaluate": ("evaluate.evaluate", "run", "measure adapters in latents and in pixels"),
    "decode": ("latents.decode", "run", "decode latent files into videos or pictures"),
    "encode": ("latents.encode", "run", "encode videos and images into latent files"),
    "inspect": ("latents.inspect", "run", "say what latent files are"),
    "reconstruct": ("evaluate.reconstruct", "run", "encode and decode one video with one VAE"),
    "cache": ("musubi.cache", "run", "make musubi-tuner's latent caches from its dataset config"),
    "check-cache": ("musubi.check_cache", "run", "find what is wrong in musubi-tuner's latent caches, and mend it"),
    "demo": ("demo", "run", "extract, train and evaluate with small models on real clips"),
    "tiny": ("tiny.train", "run", "train one of the embedded small VAEs"),
    "musubi": ("musubi.script", "run", "run a script of musubi-tuner with KVAE in the place of its VAE"),
    "vfl-pack": ("vfl.pack", "run", "pack pictures of characters into shards, for a Video-Free LoRA"),
    "vfl-cache": ("vfl.cache", "run", "encode prompts and pictures once, for a Video-Free LoRA"),
    "vfl-head": ("vfl.head", "run", "train the identity head of a Video-Free LoRA on pictures of characters"),
    "vfl-import-head": ("vfl.import_head", "run", "turn a published identity head, a .pt file, into safetensors"),
    "vfl-train": ("vfl.train", "run", "train a LoRA that keeps a character's identity, on pictures alone"),
    "vfl-generate": ("vfl.generate", "run", "generate videos with a LoRA of HunyuanVideo 1.5 and without it"),
    "vfl-export": ("vfl.export", "run", "convert a LoRA of HunyuanVideo 1.5 for other programs"),
    "fetch": ("fetch", "run", "download a KVAE or an adapter"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0, 1 (done, but clips were skipped), 2 (an error, printed in one line) or 130 (Ctrl-C).

    Errors that only a change of this program can mend are raised.
    """
    _prepare_process()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        leave()
        sys.stdout.flush()  # errors of printing are raised here, where they are caught, not at the end of the process
        return code
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is saved", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = _line(error)
        if line is None:
            raise
        print(f"error: {printable(line)}", file=sys.stderr)
        return 2


def _prepare_process() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console's encoding may lack characters of file names
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # huggingface_hub requests files and nothing else


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m training",
        description="Train and measure adapters between HunyuanVideo and KVAE latents; use them with other programs.",
        epilog="`python -m training COMMAND -h` lists a command's options.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (file, run, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:  # the other commands' modules and their dependencies are not imported
            module, function = import_module(f".{file}", __package__), run
            make_config = getattr(module, f"{name.title().replace('-', '')}Config")
            subparser.description = module.__doc__
            add_options(subparser, make_config)
    options = vars(parser.parse_args(argv))
    del options["command"]
    config = make_config(**options)
    check_options(config)
    _check_device(options.get("device", "cpu"))
    return getattr(module, function)(config)


def _line(error: Exception) -> str | None:
    """The message for an error that a user can do something about; None for a fault of this program."""
    if isinstance(error, UserError | WeightsError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory; use smaller clips or batches, or --device cpu"
    if is_out_of_memory(error):
        return "out of memory; use smaller clips or batches, or close other programs"
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report it again at exit
        return "nobody reads the output any longer"
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {reason(error)}; nothing half-written is left"
    return None


def _check_device(name: str) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=name).add(1).item()
    except Exception as error:  # each missing backend fails in its own way
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {name} is not available on this machine ({what}); use cpu") from None
