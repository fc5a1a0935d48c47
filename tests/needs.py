"""What some tests need and a machine may lack. Each reason to skip a test says what would run it."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

COMFYUI = "needs ComfyUI: set COMFYUI_PATH to its folder, and use a Python that has its requirements"
FFMPEG = "needs ffmpeg: install it, and put it on the PATH"
GIT = "needs git, and a checkout that git made"
GPU = "needs an NVIDIA GPU, and a PyTorch built for CUDA"
KANDINSKY = "needs Kandinsky's code: set KANDINSKY_PATH to a checkout, and use a Python that has its requirements"
LINUX = "needs Linux: it reads /proc, or sets a limit that other systems do not enforce"
MUSUBI = "needs musubi-tuner: set MUSUBI_PATH to its folder, and use a Python that has its requirements"
POSIX = "needs Linux or macOS: Windows lacks these pipes, links, locks, signals or file names"
TEMPLATES = "needs a newer comfyui-workflow-templates-json: install it in ComfyUI's Python"

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=GPU)
kandinsky = pytest.mark.skipif("KANDINSKY_PATH" not in os.environ, reason=KANDINSKY)
linux = pytest.mark.skipif(sys.platform != "linux", reason=LINUX)
musubi = pytest.mark.skipif("MUSUBI_PATH" not in os.environ, reason=MUSUBI)
posix = pytest.mark.skipif(os.name == "nt", reason=POSIX)


def package(module: str, where: str):
    """Import a module, or skip the test.

    Args:
        where: what to install, such as "requirements-training.txt".
    """
    return pytest.importorskip(module, reason=f"needs {module}: install {where}")


def musubi_module(monkeypatch, name: str):
    """Import a module of the musubi-tuner that MUSUBI_PATH names."""
    monkeypatch.syspath_prepend(os.path.join(os.environ["MUSUBI_PATH"], "src"))
    return importlib.import_module(f"musubi_tuner.{name}")
