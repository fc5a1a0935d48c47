"""The example for Kandinsky's own code runs in it, with a sampler that gives known latents."""

import os
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

import needs
from kvae_comfyui.adapters import HybridVAE, load_adapter
from kvae_comfyui.examples import kandinsky5_10s
from kvae_comfyui.kvae import load_kvae
from kvae_comfyui.serving.pipeline_vae import PipelineVAE
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS
from made_videos import all_frames

pytestmark = needs.kandinsky

SCALE = 0.476986
LATENTS = 61  # of 10 s
EXAMPLE = ["--prompt", "a bear", "--height", "16", "--width", "24", "--device", "cpu"]
EXAMPLE += ["--kvae", str(TINY["kvae"]), "--adapter-h2k", str(TINY_ADAPTERS["h2k"])]


class Text(torch.nn.Module):
    """In the place of the text encoders."""

    def encode(self, texts, type_of_content):
        return {"text_embeds": torch.zeros(4, 8)}, torch.tensor([0, 4]), None


@pytest.fixture
def code(monkeypatch):
    """Imports a module of Kandinsky's code."""
    monkeypatch.syspath_prepend(os.environ["KANDINSKY_PATH"])
    return lambda name: import_module(f"kandinsky.{name}")


@pytest.fixture
def sampled(code, monkeypatch):
    """The latents of the sampler, [F, H, W, 16], in its code on a CPU, with no weights."""
    utils, pipeline = code("utils"), code("t2v_pipeline").Kandinsky5T2VPipeline
    latents, generator = torch.randn(LATENTS, 2, 3, 16).bfloat16(), torch.Generator
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))
    monkeypatch.setattr(code("generation_utils"), "generate", lambda *args, **options: latents)
    monkeypatch.setattr(utils, "build_vae", utils.build_vae)  # so that the example's is taken back
    monkeypatch.setattr(utils, "get_text_embedder", lambda *args, **options: Text())
    monkeypatch.setattr(utils, "get_dit", lambda *args: torch.nn.Identity())
    monkeypatch.setattr(utils, "load_file", lambda *args, **options: {})
    monkeypatch.setattr(pipeline, "expand_prompt", lambda self, prompt: prompt)
    monkeypatch.setattr(pipeline, "RESOLUTIONS", {512: [(16, 24)]})
    return latents


@pytest.fixture
def vae():
    return PipelineVAE.of(HybridVAE(load_kvae(TINY["kvae"]), *map(load_adapter, TINY_ADAPTERS.values())))


def test_ten_seconds_are_241_frames_of_kvae(sampled, vae, tmp_path, monkeypatch):
    written, write = [], kandinsky5_10s.write
    monkeypatch.setattr(kandinsky5_10s, "write", lambda options, x: [written.append(x), write(options, x)])
    kandinsky5_10s.main(["--code", os.environ["KANDINSKY_PATH"], "--output", str(tmp_path / "bear.mp4"), *EXAMPLE])
    z = (sampled / SCALE).movedim(-1, 0)[None]
    expected = 127.5 * (vae.decode(z).sample[0].clamp(-1, 1) + 1)
    assert expected.shape == (3, 241, 16, 24)
    torch.testing.assert_close(written[0].float(), expected.movedim(1, 0).float(), rtol=0, atol=1.01)
    assert all_frames(tmp_path / "bear.mp4").shape == (241, 16, 24, 3)


def test_the_first_frame_of_image_to_video(code, vae):
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    first_frame = code("i2v_pipeline").get_first_frame_from_image
    _, latent, _ = first_frame(Image.fromarray(picture), vae, "cpu", max_area=64 * 96, divisibility=16)
    x = (torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1).half()[None, :, None]
    with torch.no_grad():
        z = vae.host.encode(x)
    assert latent.shape == (1, 8, 12, 16)
    torch.testing.assert_close(latent, SCALE * z[0].movedim(0, -1).half(), rtol=0, atol=2e-3)
