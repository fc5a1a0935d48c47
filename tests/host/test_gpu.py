"""On a GPU, the nodes give the frames that they give on a CPU."""

import io

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import needs
from kvae_comfyui.benchmarks.comfy_server import Server

from .conftest import NATIVE, ROOT
from .test_server import LOAD

pytestmark = needs.gpu


def frames(server: Server, prompt: dict) -> dict[str, np.ndarray]:
    """Run a prompt; the pictures that its nodes show, by node, [T, H, W, 3] in 0..255."""
    image = needs.package("PIL.Image", "ComfyUI's requirements")
    history = server.wait(server.start(prompt))
    assert history["status"]["status_str"] == "success", history["status"]

    def picture(place: dict[str, str]) -> np.ndarray:
        address = "&".join(f"{key}={place[key]}" for key in ("filename", "subfolder", "type"))
        return np.asarray(image.open(io.BytesIO(server.content(f"/view?{address}"))).convert("RGB"))

    return {node: np.stack([picture(each) for each in shown["images"]]) for node, shown in history["outputs"].items()}


@pytest.mark.parametrize("option", ["", "--lowvram", "--novram"], ids=["by default", "lowvram", "novram"])
def test_decoding_and_encoding_on_a_gpu_is_that_on_a_cpu(comfyui_path, tmp_path, option):
    """Frames of random latents, and these frames encoded and decoded. A GPU may round float32 to TF32."""
    for folder in ("custom_nodes", "input", "output", "user", "models/vae"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "custom_nodes" / "kvae").symlink_to(ROOT)
    z = torch.randn(1, 16, 6, 8, 12, generator=torch.Generator().manual_seed(0))
    save_file({"latent_tensor": z, "latent_format_version_0": torch.tensor([])}, tmp_path / "input" / "random.latent")
    load = LOAD | {"kvae_name": "tiny KVAE (included)", "latents": NATIVE, "dtype": "fp32"}
    prompt = {
        "vae": {"class_type": "KVAELoad", "inputs": load},
        "latent": {"class_type": "LoadLatent", "inputs": {"latent": "random.latent"}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["vae", 0]}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["decode", 0], "vae": ["vae", 0]}},
        "again": {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["vae", 0]}},
        "once": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
        "twice": {"class_type": "PreviewImage", "inputs": {"images": ["again", 0]}},
    }
    with Server(comfyui_path, tmp_path) as server:
        expected = frames(server, prompt)
    with Server(comfyui_path, tmp_path, option) as server:
        found = frames(server, prompt)
    assert found.keys() == expected.keys() == {"once", "twice"}
    for node, cpu in expected.items():
        assert found[node].shape == cpu.shape == (21, 64, 96, 3)
        difference = np.abs(found[node].astype(float) - cpu)
        assert difference.mean() < 0.2 and difference.max() <= 8
