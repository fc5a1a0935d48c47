"""The pack as ComfyUI imports it, in a Python without ComfyUI."""

import subprocess
import sys

from conftest import ROOT


def test_the_pack_imports_without_comfyui_and_without_torch():
    code = "import importlib.util, sys\n" + (
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and module.WEB_DIRECTORY"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_comfyui_the_nodes_name_the_missing_module():
    code = "import asyncio, importlib.util, sys\n" + (
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "sys.modules['pack'] = module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "asyncio.run(module.comfy_entrypoint())"
    )
    # a process of its own: the tests of the nodes put a ComfyUI on this one's path
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'comfy" in out.stderr
