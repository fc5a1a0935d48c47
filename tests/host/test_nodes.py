"""The pack's nodes in ComfyUI, except Load KVAE, whose VAE test_vae.py tests."""

import pytest
import torch
from safetensors.torch import save_file

from kvae_comfyui.serving.sample_clip import sample_clip

from .conftest import NATIVE, with_hidden


def test_encode_keeps_every_frame_and_decode_gives_them_back(run, load):
    vae = load(latents=NATIVE)
    (latent,) = run("KVAEEncode", pixels=sample_clip(11, 32, 48), vae=vae)
    assert latent["samples"].shape == (1, 16, 4, 4, 6)
    assert latent["kvae_space"] == "kvae_3d_1.0"
    (image,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    (whole,) = run("VAEDecode", samples=latent, vae=vae)
    assert len(whole) == 13
    assert torch.equal(image, whole[:11])


def test_decode_accepts_scaled_latents_and_batches(run, load):
    vae, z = load(), torch.randn(2, 16, 2, 4, 4)
    (image,) = run("KVAEDecode", samples={"samples": z}, vae=vae, scaling="raw", memory_gb=0.0)
    assert image.shape == (10, 32, 32, 3)
    (again,) = run("KVAEDecode", samples={"samples": z * 0.476986}, vae=vae, scaling="scaled", memory_gb=0.0)
    torch.testing.assert_close(again, image, rtol=0, atol=1e-4)


def test_convert_then_decode_natively_is_decode_through_the_adapter(run, load):
    adapter, about = run("KVAELoadAdapter", adapter_name="h2k.safetensors")
    assert about.splitlines()[0].startswith("hunyuan_video → kvae_3d_1.0, Affine")
    assert "psnr: 12.5" in about
    latent = {"samples": torch.randn(1, 16, 2, 4, 4), "batch_index": [0]}
    (converted,) = run("KVAEConvertLatent", samples=latent, adapter=adapter)
    assert converted["kvae_space"] == "kvae_3d_1.0"
    assert converted["batch_index"] == [0]
    (image,) = run("KVAEDecode", samples=converted, vae=load(latents=NATIVE), scaling="raw", memory_gb=0.0)
    (direct,) = run("KVAEDecode", samples=latent, vae=load(), scaling="raw", memory_gb=0.0)
    assert torch.equal(image, direct)
    with pytest.raises(ValueError, match="a latent of kvae_3d_1.0; expected a hunyuan_video"):
        run("KVAEConvertLatent", samples=converted, adapter=adapter)
    with pytest.raises(ValueError, match="hunyuan_video_1.5"):
        run("KVAEConvertLatent", samples={"samples": torch.zeros(1, 32, 2, 4, 4)}, adapter=adapter)


def test_inspect_says_what_it_is(run):
    noise = 2.1 * torch.randn(1, 16, 4, 30, 40)
    (report,) = run("KVAEInspectLatent", samples={"samples": noise.sort(dim=-1).values})  # so that neighbours are alike
    assert "hunyuan_video or kvae_3d_1.0" in report
    assert "13 frames of 320 x 240 pixels" in report
    assert "it looks raw" in report
    assert "this is noise" in run("KVAEInspectLatent", samples={"samples": noise})[0]


def test_a_saved_latent_loads_with_our_node_and_with_the_stock_node(run, load, comfy, base):
    (latent,) = run("KVAEEncode", pixels=sample_clip(6, 32, 32), vae=load(latents=NATIVE))
    node = with_hidden(comfy.classes["KVAESaveLatent"])
    out = node.execute(samples=latent, filename_prefix="latents/kept/KVAE")
    (file,) = (base / "output" / "latents" / "kept").iterdir()
    assert out.args[0] is latent
    name = f"latents/kept/{file.name} [output]"
    options = comfy.classes["KVAELoadLatent"].define_schema().inputs[0].options
    assert name in [option.replace("\\", "/") for option in options]
    again, report = run("KVAELoadLatent", file=name, scaling="auto")
    assert torch.equal(again["samples"], latent["samples"])
    assert (again["kvae_space"], again["kvae_frames"]) == ("kvae_3d_1.0", 6)
    assert report.startswith("Read as a ComfyUI latent.")
    (stock,) = run("LoadLatent", latent=name)  # ComfyUI's own loader reads it too
    assert torch.equal(stock["samples"], latent["samples"])
    assert "press R" in comfy.classes["KVAELoadLatent"].validate_inputs("absent.latent")


def test_a_latent_that_can_be_read_in_two_ways_needs_a_model(run, base):
    path = base / "input" / "kandinsky.safetensors"
    save_file({"latents": torch.randn(1, 16, 31, 8, 16)}, path)
    try:
        with pytest.raises(ValueError, match="set model"):
            run("KVAELoadLatent", file=path.name, scaling="auto")
        latent, report = run("KVAELoadLatent", file=path.name, scaling="auto", model="kandinsky5")
        assert latent["samples"].shape == (1, 16, 16, 31, 8)
        assert latent["kvae_space"] == "hunyuan_video"
        assert "61 frames of 64 x 248 pixels" in report
    finally:
        path.unlink()


def test_compare_shows_two_vaes_and_their_difference(run, load):
    a, b = load(latents=NATIVE), load()
    pixels = sample_clip(6, 40, 48)
    both, difference, report = run("KVAECompare", vae_a=a, vae_b=b, pixels=pixels)
    assert both.shape == (5, 32, 96, 3)
    assert difference.shape == (5, 32, 48, 3)
    assert [line.split()[0] for line in report.splitlines()] == ["PSNR", "A", "B"]
    (latent,) = run("KVAEEncode", pixels=pixels, vae=a)
    *_, report = run("KVAECompare", vae_a=a, vae_b=b, samples=latent)
    assert "B against A" in report
    for wrong in ({}, {"pixels": pixels, "samples": latent}):
        with pytest.raises(ValueError, match="connect either pixels or samples"):
            run("KVAECompare", vae_a=a, vae_b=b, **wrong)


def test_compare_accepts_a_stock_vae(run, load):
    import comfy.sd

    # ComfyUI's small HunyuanVideo VAE, untrained
    taehv = pytest.importorskip("comfy.taesd.taehv", reason="needs a ComfyUI with TAEHV")
    stock = comfy.sd.VAE(sd=taehv.TAEHV(latent_channels=16).half().state_dict())
    both, _, report = run("KVAECompare", vae_a=stock, vae_b=load(), pixels=sample_clip(6, 40, 48))
    assert both.shape == (5, 32, 96, 3)
    assert len(report.splitlines()) == 3
