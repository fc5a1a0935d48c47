"""A real ComfyUI, found through COMFYUI_PATH: its modules in this process, and its server on loopback.

COMFYUI_PATH=/path/to/ComfyUI python -m pytest tests/host

The Python that runs the tests must have ComfyUI's requirements.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import needs
from kvae_comfyui.adapters import LatentAdapter, latent_space, save_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.benchmarks.comfy_server import Server
from kvae_comfyui.kvae import load_kvae, save_kvae
from small_models import small

ROOT = Path(__file__).resolve().parents[2]
NATIVE = "KVAE (native)"  # what latents is called for KVAE's own
HUNYUAN_15 = "HunyuanVideo 1.5"
T4S16 = "KVAE-3D-2.0-t4s16.safetensors"  # a small random one
TINY = ROOT / "training" / "tiny" / "assets" / "tiny_kvae.safetensors"


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The folder of ComfyUI; skips the test if COMFYUI_PATH is not set."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip(needs.COMFYUI)
    return Path(path).resolve()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A ComfyUI base directory with this pack in custom_nodes, the tiny KVAE, a small 2.0-t4s16, and adapters that map
    HunyuanVideo's latents to and from the first (h2k, k2h), HunyuanVideo 1.5's to and from the second (h15, k15).
    """
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "input", "output", "user", "models/vae", "models/kvae", "models/latent_adapters"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "kvae").symlink_to(ROOT)
    (base / "models" / "vae" / "KVAE.safetensors").symlink_to(TINY)
    (base / "models" / "vae" / "hunyuan.safetensors").symlink_to(TINY.with_name("tiny_hunyuan.safetensors"))
    torch.manual_seed(0)
    for name, source, target in (
        ("h2k", "hunyuan_video", "kvae_3d_1.0"),
        ("k2h", "kvae_3d_1.0", "hunyuan_video"),
        ("h15", "hunyuan_video_1.5", "kvae_3d_2.0_t4s16"),
        ("k15", "kvae_3d_2.0_t4s16", "hunyuan_video_1.5"),
    ):
        spaces = latent_space(source), latent_space(target)
        adapter = LatentAdapter(Affine(*(space.channels for space in spaces)), *spaces, metrics={"psnr": 12.5})
        save_adapter(base / "models" / "latent_adapters" / f"{name}.safetensors", adapter)
    save_kvae(base / "models" / "vae" / T4S16, small("2.0-t4s16"), torch.float32, {})
    return base


@pytest.fixture(scope="session")
def comfy(comfyui_path, base):
    """ComfyUI's modules in this process, on the CPU, with this pack loaded as ComfyUI loads it."""
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base)]
    sys.path.insert(0, str(comfyui_path))
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.model_management

        import nodes

        asyncio.run(nodes.load_custom_node(str(ROOT)))
        extras = "hunyuan", "kandinsky5", "latent", "lt", "lt_audio", "multigpu"
        for name in extras:
            file = comfyui_path / "comfy_extras" / f"nodes_{name}.py"
            if file.exists():  # older hosts lack some
                asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    finally:
        sys.argv = argv
    return SimpleNamespace(classes=nodes.NODE_CLASS_MAPPINGS, management=comfy.model_management, path=comfyui_path)


@pytest.fixture
def run(comfy):
    """Run one node as ComfyUI does, without gradients: run("VAEDecode", vae=…, samples=…) returns its outputs."""

    def run(node_id: str, **inputs):
        cls = comfy.classes[node_id]
        with torch.inference_mode():
            if hasattr(cls, "define_schema"):
                return cls.execute(**inputs).args
            return getattr(cls(), cls.FUNCTION)(**inputs)

    return run


@pytest.fixture
def load(run):
    """Load the tiny KVAE: load() with the adapters, load(latents=NATIVE) without; or load(kvae_name=T4S16, …)."""

    def load(**inputs):
        defaults = {
            "kvae_name": "KVAE.safetensors",
            "latents": "HunyuanVideo / Kandinsky 5",
            "decode_adapter": "auto",
            "encode_adapter": "auto",
            "dtype": "fp32",
            "memory_gb": 0.0,
        }
        return run("KVAELoad", **(defaults | inputs))[0]

    return load


@pytest.fixture(scope="session")
def tiny_kvae():
    """The tiny KVAE outside ComfyUI."""
    return load_kvae(TINY)


@pytest.fixture(scope="session")
def server(comfyui_path, base):
    """A ComfyUI server on the same base directory."""
    with Server(comfyui_path, base) as server:
        yield server


@pytest.fixture(scope="session")
def info(server):
    """Schemas of all nodes, from the server."""
    return server.get("/object_info")


@pytest.fixture(scope="session")
def ours(info):
    """Schemas of this pack's nodes."""
    return {name: node for name, node in info.items() if node["python_module"].startswith("custom_nodes.kvae")}


def with_hidden(cls):
    """A node class as the executor prepares it, with no prompt to hide in files."""
    hidden = type("Hidden", (), {"prompt": None, "extra_pnginfo": {"workflow": {"nodes": []}}})
    return type(cls.__name__, (cls,), {"hidden": hidden})
