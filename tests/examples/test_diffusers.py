"""The examples run in diffusers' own pipelines, from the command line to the video; KVAE decodes their latents."""

from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kvae_comfyui.adapters import HybridVAE, load_adapter
from kvae_comfyui.kvae import load_kvae
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.serving.pipeline_vae import PipelineVAE
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vaes import TINY as WEIGHTS
from kvae_comfyui.training.vaes import TINY_15_ADAPTERS, TINY_ADAPTERS
from made_videos import all_frames
from tiny_pipelines import TINY, diffusers

FRAMES, HEIGHT, WIDTH = 17, 32, 48


@pytest.fixture
def files(request):
    """Those of the pipeline that the test runs: a tiny KVAE and its adapters."""
    if TINY[request.getfixturevalue("name")].space == "hunyuan_video_1.5":
        return {"kvae": WEIGHTS["kvae-t4s16"], **TINY_15_ADAPTERS}
    return {"kvae": WEIGHTS["kvae"], **TINY_ADAPTERS}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    return path


def size(name: str) -> dict[str, int]:
    """The arguments for a small video. The image decides the size in HunyuanVideo 1.5."""
    return {} if name == "hunyuan_video_15 image" else {"height": HEIGHT, "width": WIDTH}


@pytest.mark.parametrize("name", TINY)
def test_an_example_generates_a_video_with_kvae(name, files, picture, tmp_path, monkeypatch):
    tiny, decoded = TINY[name], []
    tiny.save(tmp_path / "model")
    tiny.without_text(monkeypatch)
    decode = PipelineVAE.decode

    def spy(vae, z, *args, **options):
        decoded.append((vae, decode(vae, z, *args, **options)))
        return decoded[-1][1]

    monkeypatch.setattr(PipelineVAE, "decode", spy)
    arguments = {"prompt": "waves", "model": tmp_path / "model", "output": tmp_path / "video.mp4"}
    arguments |= {"frames": FRAMES, "steps": 1, "device": "cpu", **size(name)}
    arguments |= {"kvae": files["kvae"], "adapter-h2k": files["h2k"]}
    if tiny.image:
        arguments |= {"image": picture, "adapter-k2h": files["k2h"]}
    if name.startswith("skyreels"):
        arguments |= {"transformer": tmp_path / "model" / "transformer"}
    example = import_module(f"kvae_comfyui.examples.{name.split()[0]}")
    example.main([part for key, value in arguments.items() for part in (f"--{key}", str(value))])

    ((vae, (frames,)),) = decoded
    assert vae._hf_hook  # model CPU offload
    video = all_frames(tmp_path / "video.mp4")
    assert len(video) == FRAMES - 4 * ("33ch" in name)  # diffusers leaves out the first latent there
    shown = (127.5 * (frames[0].clamp(-1, 1) + 1)).movedim(0, -1)[-len(video) :]
    assert np.abs(video - shown.numpy()).mean() < 8


def loaded(name, files, tmp_path, monkeypatch):
    """The tiny pipeline with KVAE as its VAE, as in the examples, and with model CPU offload."""
    TINY[name].save(tmp_path / "model")
    TINY[name].without_text(monkeypatch)
    vae = {} if name.startswith("hunyuan_video_15") else {"vae": None}
    pipe = TINY[name].type.from_pretrained(tmp_path / "model", **vae, torch_dtype=torch.bfloat16)
    adapters = load_adapter(files["h2k"]), load_adapter(files["k2h"])
    pipe.vae = PipelineVAE.of(HybridVAE(load_kvae(files["kvae"]), *adapters))
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, name, picture, **options) -> torch.Tensor:
    options |= size(name) | ({"image": Image.open(picture)} if TINY[name].image else {})
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt="waves", num_frames=FRAMES, num_inference_steps=1, generator=generator, **options).frames


@pytest.mark.parametrize("name", [name for name in TINY if "33ch" not in name])  # whose latents lack the first one
def test_a_file_of_a_pipelines_latents_decodes_to_its_frames(name, files, picture, tmp_path, monkeypatch):
    pipe = loaded(name, files, tmp_path, monkeypatch)
    frames = generate(pipe, name, picture, output_type="pt")
    latents = generate(pipe, name, picture, output_type="latent")
    save_file({"latents": latents.float().contiguous()}, tmp_path / "latents.safetensors")
    kandinsky = name.startswith("kandinsky")
    assert latents.shape[-1 if kandinsky else 1] == pipe.vae.config.latent_channels
    file = load_latent(tmp_path / "latents.safetensors", model="kandinsky5" if kandinsky else TINY[name].space)
    assert file.space == TINY[name].space
    with torch.no_grad():
        x = pipe.vae.host.decode(file.z)
    assert x.shape[2] == FRAMES
    shown = (x / 2 + 0.5).clamp(0, 1).movedim(2, 1)
    torch.testing.assert_close(frames, shown, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["hunyuan_video"])
def test_casting_the_pipeline_casts_kvae(name, files, picture, tmp_path, monkeypatch):
    pipe = loaded(name, files, tmp_path, monkeypatch)
    frames = generate(pipe, name, picture, output_type="pt")
    pipe.remove_all_hooks()
    pipe.to(torch.bfloat16)
    assert pipe.vae.dtype is torch.bfloat16
    assert (generate(pipe, name, picture, output_type="pt") - frames).abs().mean() < 0.02


def test_an_image_needs_the_adapter_for_encoding(picture, tmp_path, monkeypatch):
    tiny = TINY["hunyuan_video image"]
    tiny.save(tmp_path / "model")
    tiny.without_text(monkeypatch)
    kvae = ["--kvae", str(WEIGHTS["kvae"]), "--adapter-h2k", str(TINY_ADAPTERS["h2k"]), "--device", "cpu"]
    model = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "a.mp4")]
    with pytest.raises(UserError, match="--adapter-k2h is missing: to encode hunyuan_video"):
        import_module("kvae_comfyui.examples.hunyuan_video").main(
            ["--prompt", "waves", "--image", str(picture), *model, *kvae]
        )


# ---- what examples/README.md says of diffusers


def test_a_vae_is_given_after_loading(tmp_path, monkeypatch):
    tiny = TINY["hunyuan_video"]
    tiny.save(tmp_path)
    tiny.without_text(monkeypatch)
    vae = PipelineVAE.of(HybridVAE(load_kvae(WEIGHTS["kvae"])))
    with pytest.raises(ValueError, match="vae"):  # since it is no model of diffusers
        tiny.type.from_pretrained(tmp_path, vae=vae)
    pipe = tiny.type.from_pretrained(tmp_path, vae=None)
    pipe.vae = vae
    pipe.save_pretrained(tmp_path / "again")
    assert tiny.type.load_config(tmp_path / "again")["vae"] == [None, None]


def test_hunyuan_video_15_is_loaded_with_its_own_vae_first(tmp_path, monkeypatch):
    tiny = TINY["hunyuan_video_15"]
    tiny.save(tmp_path)
    tiny.without_text(monkeypatch)
    with pytest.raises(AttributeError, match="config"):
        tiny.type.from_pretrained(tmp_path, vae=None)
    assert isinstance(tiny.type.from_pretrained(tmp_path).vae, diffusers.AutoencoderKLHunyuanVideo15)
