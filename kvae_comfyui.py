"""This checkout as the package `kvae_comfyui`, whatever its folder is called.

    import sys; sys.path.insert(0, "path/to/the/checkout")
    from kvae_comfyui.adapters import HybridVAE

Inside the pack every import is relative, since ComfyUI chooses the name under which it loads the folder. A module with
a `__path__` is a package, so this file gives scripts, tests and `python -m training` one fixed name.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
