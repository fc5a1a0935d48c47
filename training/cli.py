"""The command line: one entry point, a subcommand for each job."""

from __future__ import annotations

import argparse
import errno
import sys
from importlib import import_module

import torch

from ..kvae import WeightsError
from .errors import UserError
from .options import add_options

INTERRUPTED = 130
COMMANDS = {  # of each: the module, its function, a summary
    "extract": ("extract", "run", "latent pairs from videos"),
    "pack": ("packing", "run_pack", "latent pairs into memory-mapped shards"),
    "unpack": ("packing", "run_unpack", "shards back into latent pairs"),
    "train": ("train", "run", "both adapters from latent pairs"),
    "evaluate": ("evaluate", "run", "adapters measured in latents and in pixels"),
    "reconstruct": ("reconstruct", "run", "one video through one VAE"),
    "demo": ("demo", "run", "all of the above on small models and real clips"),
    "tiny": ("tiny", "run", "train a member of the embedded small pair"),
    "fetch": ("fetch", "run", "download a KVAE or an adapter"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, 1 (done, with some clips skipped), 2 (an error, said in one line) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Adapters between HunyuanVideo and KVAE latents: extract pairs, train, evaluate.",
        epilog="`python -m training COMMAND -h` lists a command's options.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (file, run, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:  # the modules of the others, and what those need, stay unread
            module, function = import_module(f".{file}", __package__), run
            config = getattr(module, f"{name.capitalize()}Config")
            subparser.description = module.__doc__
            add_options(subparser, config)
    options = vars(parser.parse_args(argv))
    del options["command"]
    try:
        _check_device(options.get("device", "cpu"))
        return getattr(module, function)(config(**options))
    except (UserError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: the device is out of memory; use smaller clips or batches, or --device cpu", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; nothing half-written is left", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 2


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}); use cpu") from None
