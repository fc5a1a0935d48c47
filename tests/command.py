"""The command line of training, as a user starts it, and as a call in this process that must refuse."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from conftest import ROOT
from kvae_comfyui.training.cli import main


def start(*argv: object, env: dict[str, str] | None = None, **options) -> subprocess.Popen[str]:
    """Start `python -m training …` on one thread, with pipes for its output unless `options` say otherwise."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, argv)],
        cwd=ROOT, env={**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}, text=True, encoding="utf-8",
        **pipes | options,
    )  # fmt: skip


def launch(*argv: object, program: tuple[str, ...] = ("-m", "training"), **env: str) -> subprocess.Popen[str]:
    """`torchrun -m training …` in two processes, each on one thread, on a free port.

    Args:
        program: what is run in the place of `-m training`.
        env: variables of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return subprocess.Popen(
        [*command, *program, *map(str, argv)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"} | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def refusal(argv: list[str], capsys) -> str:
    """The one line with which a command refuses its options or its input.

    Raises:
        AssertionError: the exit code is not 2, or the command prints more lines of error than one.
    """
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err
