"""KVAE 2.0-t4s16 in place of HunyuanVideo 1.5's VAE, through adapters, in ComfyUI's own nodes and in the pack's."""

import pytest
import torch

from kvae_comfyui.adapters import HybridVAE, load_adapter
from kvae_comfyui.kvae import load_kvae
from kvae_comfyui.serving.sample_clip import sample_clip

from .conftest import HUNYUAN_15, NATIVE, T4S16, with_hidden

Z = torch.randn(1, 32, 7, 3, 4, generator=torch.Generator().manual_seed(1))  # 25 frames of 64 x 48
CONDITIONING = [[torch.zeros(1, 1), {}]]


@pytest.fixture
def vae(load):
    return load(kvae_name=T4S16, latents=HUNYUAN_15)


@pytest.fixture
def hybrid(base):
    folder = base / "models" / "latent_adapters"
    adapters = (load_adapter(folder / f"{name}.safetensors") for name in ("h15", "k15"))
    return HybridVAE(load_kvae(base / "models" / "vae" / T4S16), *adapters)


@pytest.fixture
def upscaled(run, comfy):
    """A latent of 160 x 96 pixels from HunyuanVideo 1.5's latent upscaler, small and random."""
    sr = pytest.importorskip("comfy.ldm.hunyuan_video.upsampler", reason="needs a ComfyUI with HunyuanVideo 1.5")
    torch.manual_seed(0)
    settings = {"in_channels": 32, "out_channels": 32, "hidden_channels": 8, "num_blocks": 1, "global_residual": False}
    model = sr.HunyuanVideo15SRModel("720p", settings)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    size = {"width": 160, "height": 96, "upscale_method": "bilinear", "crop": "disabled"}
    return run("HunyuanVideo15LatentUpscaleWithModel", model=model, samples={"samples": Z}, **size)[0]


def test_stock_decode_and_encode_are_those_of_hybrid_vae(run, vae, hybrid):
    (image,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    with torch.no_grad():
        expected = ((hybrid.decode(Z) + 1) / 2).clamp(0, 1)[0].movedim(0, -1)
    assert image.shape == (25, 48, 64, 3)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    clip = sample_clip(9, 48, 64)
    (latent,) = run("VAEEncode", vae=vae, pixels=clip)
    with torch.no_grad():
        expected = hybrid.encode(clip.movedim(-1, 0)[None] * 2 - 1)
    assert latent["samples"].shape == (1, 32, 3, 3, 4)
    torch.testing.assert_close(latent["samples"], expected, rtol=1e-4, atol=1e-4)


def test_an_empty_latent_decodes_whole_in_tiles_and_to_a_video(run, vae, comfy, base):
    if "EmptyHunyuanVideo15Latent" not in comfy.classes:
        pytest.skip("needs a ComfyUI with EmptyHunyuanVideo15Latent")
    (empty,) = run("EmptyHunyuanVideo15Latent", width=128, height=96, length=9, batch_size=2)
    (whole,) = run("VAEDecode", vae=vae, samples=empty)
    assert whole.shape == (18, 96, 128, 3)
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}
    (tiled,) = run("VAEDecodeTiled", vae=vae, samples=empty, **tiles)
    assert tiled.shape == whole.shape and tiled.isfinite().all()
    node, settings = with_hidden(comfy.classes["KVAEDecodeToVideo"]), {"fps": 24.0, "codec": "h264", "crf": 18}
    with torch.inference_mode():
        node.execute(
            vae=vae, samples=empty, scaling="raw", memory_gb=0.0, filename_prefix="hunyuan_15/KVAE", **settings
        )
    assert len(list((base / "output" / "hunyuan_15").glob("*.mp4"))) == 2


def test_image_to_video_conditioning_is_vae_encode(run, vae, comfy):
    if "HunyuanVideo15ImageToVideo" not in comfy.classes:
        pytest.skip("needs a ComfyUI with HunyuanVideo15ImageToVideo")
    image = sample_clip(1, 48, 64)
    (expected,) = run("VAEEncode", vae=vae, pixels=image)
    size = {"width": 64, "height": 48, "length": 9, "batch_size": 1}
    inputs = {"positive": CONDITIONING, "negative": CONDITIONING, "vae": vae, "start_image": image}
    positive, _, latent = run("HunyuanVideo15ImageToVideo", **inputs, **size)
    found = positive[0][1]["concat_latent_image"]
    assert found.shape == latent["samples"].shape == (1, 32, 3, 3, 4)
    assert torch.equal(found[:, :, :1], expected["samples"])


def test_super_resolution_encodes_its_image_and_its_latents_decode(run, vae, comfy, upscaled):
    """The upscaled latent goes through Super Resolution, whose start image our VAE encodes, to the decoder."""
    image = sample_clip(1, 96, 160)
    (expected,) = run("VAEEncode", vae=vae, pixels=image)
    inputs = {"positive": CONDITIONING, "negative": CONDITIONING, "latent": upscaled, "noise_augmentation": 0.7}
    positive, _, latent = run("HunyuanVideo15SuperResolution", **inputs, vae=vae, start_image=image)
    found = positive[0][1]["concat_latent_image"]
    assert torch.equal(found[:, :32, :1], expected["samples"])
    (frames,) = run("KVAEDecode", vae=vae, samples=latent, scaling="raw", memory_gb=0.0)
    assert frames.shape == (25, 96, 160, 3)


def test_the_nodes_of_the_pack_know_the_space(run, vae, load, comfy, base):
    clip = sample_clip(11, 48, 64)
    (latent,) = run("KVAEEncode", pixels=clip, vae=vae)
    assert (latent["kvae_space"], latent["samples"].shape) == ("hunyuan_video_1.5", (1, 32, 4, 3, 4))
    (image,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    assert len(image) == 11
    scaled = {**latent, "samples": latent["samples"] * 1.03682}
    (again,) = run("KVAEDecode", samples=scaled, vae=vae, scaling="scaled", memory_gb=0.0)
    torch.testing.assert_close(again, image, rtol=0, atol=1e-4)
    (report,) = run("KVAEInspectLatent", samples=latent)
    assert "hunyuan_video_1.5" in report and "of 64 x 48 pixels" in report

    adapter, _ = run("KVAELoadAdapter", adapter_name="h15.safetensors")
    (converted,) = run("KVAEConvertLatent", samples=latent, adapter=adapter)
    assert (converted["kvae_space"], converted["samples"].shape[1]) == ("kvae_3d_2.0_t4s16", 64)
    native = load(kvae_name=T4S16, latents=NATIVE)
    (same,) = run("KVAEDecode", samples=converted, vae=native, scaling="raw", memory_gb=0.0)
    torch.testing.assert_close(same, image, rtol=0, atol=1e-4)

    with_hidden(comfy.classes["KVAESaveLatent"]).execute(samples=latent, filename_prefix="hunyuan_15_latent/KVAE")
    (file,) = (base / "output" / "hunyuan_15_latent").iterdir()
    loaded, _ = run("KVAELoadLatent", file=f"hunyuan_15_latent/{file.name} [output]", scaling="auto")
    assert torch.equal(loaded["samples"], latent["samples"])
    assert loaded["kvae_space"] == "hunyuan_video_1.5"


def test_compare_takes_it_beside_the_native_vae(run, vae, load):
    outputs = run("KVAECompare", vae_a=vae, vae_b=load(kvae_name=T4S16, latents=NATIVE), pixels=sample_clip(9, 48, 64))
    assert "dB" in next(output for output in outputs if isinstance(output, str))


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_about_says_what_was_loaded_in_each_dtype(run, dtype):
    settings = {"decode_adapter": "auto", "encode_adapter": "auto", "dtype": dtype, "memory_gb": 0.0}
    vae, report = run("KVAELoad", kvae_name=T4S16, latents=HUNYUAN_15, **settings)
    for part in ("decodes hunyuan_video_1.5 latents through h15.safetensors", "through k15.safetensors", "1280x720"):
        assert part in report
    (image,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    assert image.isfinite().all()
