"""musubi-tuner's own --latent_path decodes the latents that `encode --format musubi` writes, with KVAE as its VAE."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import needs
from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.networks import Residual
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.latent_writers import save_clip
from kvae_comfyui.serving.pipeline_vae import PipelineVAE
from small_models import small

pytestmark = needs.musubi


def vae(space):
    """A small random KVAE that serves latents of this space."""
    kvae = small("2.0-t4s16" if space.channels == 32 else "1.0")
    native = SPACES["kvae_3d_2.0_t4s16" if space.channels == 32 else "kvae_3d_1.0"]
    return PipelineVAE(HostVAE(kvae, LatentAdapter(Residual(space.channels, native.channels), space, native))).eval()


@pytest.mark.parametrize(
    ("script", "loader", "name", "count"),
    [
        ("hv_generate_video", "prepare_vae", "hunyuan_video", 2),
        ("hv_1_5_generate_video", "load_vae", "hunyuan_video_1.5", 1),
    ],
)
@torch.no_grad()
def test_musubi_decodes_what_we_write(tmp_path, monkeypatch, script, loader, name, count):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # an import of its asks for it, also on a CPU
    theirs, space = needs.musubi_module(monkeypatch, script), SPACES[name]
    served = vae(space).requires_grad_(False)
    clips = [torch.randn(1, space.channels, 3, 2, 4) for _ in range(count)]
    files = [tmp_path / f"clip{i}.safetensors" for i in range(count)]
    for path, z in zip(files, clips, strict=True):
        save_clip(path, z, space, 9, "musubi", {})
    loaded = (served, torch.float32) if loader == "prepare_vae" else served
    monkeypatch.setattr(theirs, loader, lambda *_, **__: loaded)
    words = ["--latent_path", *map(str, files), "--output_type", "images", "--save_path", str(tmp_path / "out")]
    words += ["--vae_dtype", "float32", "--device", "cpu", "--vae", "ours"]
    if script == "hv_generate_video":  # which demands options that it then does not use
        words += [
            word for key in ("dit", "text_encoder1", "text_encoder2", "prompt") for word in (f"--{key}", "unused")
        ]
    monkeypatch.setattr(sys, "argv", [script, *words])
    theirs.main()
    for path, z in zip(files, clips, strict=True):
        found = [np.asarray(Image.open(each)) for each in sorted((tmp_path / "out").glob(f"*{path.stem}/*.png"))]
        expected = ((served.host.decode(z)[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 3, 0).numpy()
        assert np.stack(found).shape == expected.shape
        assert np.abs(np.stack(found) - expected).max() <= 1
