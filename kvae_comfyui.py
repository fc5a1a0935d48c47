"""This checkout as the package `kvae_comfyui`, whatever its folder is called.

    import sys; sys.path.insert(0, "path/to/the/checkout")
    from kvae_comfyui.adapters import HybridVAE

Inside the pack every import is relative, since ComfyUI loads the folder under a name of its own. A module with a
`__path__` is a package, so this file gives scripts, tests and `python -m training` one such name too.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
