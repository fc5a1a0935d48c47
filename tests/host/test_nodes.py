"""The pack's own nodes in ComfyUI, beyond Load KVAE."""

import av
import pytest
import torch

from kvae_comfyui.adapters.sample_clip import sample_clip

NATIVE = "KVAE (native)"


class Nested:
    """As ComfyUI's latents of video with audio."""

    is_nested = True

    def __init__(self, *parts):
        self.parts = parts

    def unbind(self):
        return self.parts


def test_encode_keeps_every_frame_and_decode_gives_them_back(run, load):
    vae = load(latents=NATIVE)
    (latent,) = run("KVAEEncode", pixels=sample_clip(11, 32, 48), vae=vae)
    assert latent["samples"].shape == (1, 16, 4, 4, 6)
    assert latent["kvae_space"] == "kvae_3d_1.0"
    (image,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    (whole,) = run("VAEDecode", samples=latent, vae=vae)
    assert len(whole) == 13
    assert torch.equal(image, whole[:11])


def test_decode_takes_scaled_and_nested_latents_and_batches(run, load):
    vae, z = load(), torch.randn(2, 16, 2, 4, 4)
    (image,) = run("KVAEDecode", samples={"samples": z}, vae=vae, scaling="raw", memory_gb=0.0)
    assert image.shape == (10, 32, 32, 3)
    nested = {"samples": Nested(z * 0.476986, torch.zeros(2, 8, 5))}
    (again,) = run("KVAEDecode", samples=nested, vae=vae, scaling="scaled", memory_gb=0.0)
    torch.testing.assert_close(again, image, rtol=0, atol=1e-4)


def test_a_latent_of_another_space_is_refused(run, load):
    (latent,) = run("KVAEEncode", pixels=sample_clip(1, 32, 32), vae=load(latents=NATIVE))
    with pytest.raises(ValueError, match="a latent of kvae_3d_1.0; expected a hunyuan_video latent"):
        run("KVAEDecode", samples=latent, vae=load(), scaling="raw", memory_gb=0.0)


def test_a_stock_vae_is_refused(run):
    stock = type("Other", (), {"first_stage_model": torch.nn.Identity()})()
    with pytest.raises(ValueError, match="This VAE is a Identity; expected one from Load KVAE"):
        run("KVAEDecode", samples={"samples": torch.zeros(1, 16, 1, 4, 4)}, vae=stock, scaling="raw", memory_gb=0.0)
    with pytest.raises(ValueError, match="expected one from Load KVAE"):
        run("KVAEEncode", pixels=sample_clip(1, 32, 32), vae=stock)


def test_bad_clips_are_refused(run, load):
    vae = load()
    with pytest.raises(ValueError, match="at least one frame"):
        run("KVAEEncode", pixels=torch.zeros(0, 32, 32, 3), vae=vae)
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        run("KVAEEncode", pixels=torch.zeros(1, 4, 32, 3), vae=vae)


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


def test_video_is_what_decode_shows(run, load, comfy, base):
    vae = load(latents=NATIVE)
    (latent,) = run("KVAEEncode", pixels=sample_clip(30, 64, 96), vae=vae)
    (image,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    audio = {"waveform": torch.sin(torch.arange(96000) / 20)[None, None], "sample_rate": 48000}
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"fps": 25.0, "codec": "h264", "crf": 5, "filename_prefix": "shown/t"}
    with torch.inference_mode():
        out = node.execute(samples=latent, vae=vae, scaling="raw", memory_gb=0.0, audio=audio, **options)
    (path,) = (base / "output" / "shown").iterdir()
    assert out.args[0].get_dimensions() == (96, 64)
    with av.open(str(path)) as video:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 25
        assert video.streams.video[0].codec_context.colorspace == 1  # BT.709, so that players show the same colours
        assert "workflow" in video.metadata
    assert len(frames) == 30
    with av.open(str(path)) as video:
        seconds = sum(frame.samples for frame in video.decode(audio=0)) / 48000
    assert abs(seconds - 30 / 25) < 0.05
    error = torch.stack(frames).float() / 255 - image
    assert error.square().mean().sqrt() < 0.06  # colour is halved in resolution
    assert error.mean((0, 1, 2)).abs().max() < 0.01  # but not shifted


@pytest.mark.parametrize("codec", ["h265", "av1"])
def test_other_codecs(load, comfy, base, codec):
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"fps": 23.976, "codec": codec, "crf": 30, "filename_prefix": f"{codec}/t"}
    with torch.inference_mode():
        node.execute(
            samples={"samples": torch.randn(1, 16, 1, 8, 8)}, vae=load(), scaling="raw", memory_gb=0.0, **options
        )
    (path,) = (base / "output" / codec).iterdir()
    with av.open(str(path)) as video:
        assert len(list(video.decode(video=0))) == 1
        assert float(video.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


def test_a_cancelled_video_leaves_no_file(run, load, comfy, base):
    vae = load(latents=NATIVE)
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"fps": 25.0, "codec": "h264", "crf": 5, "filename_prefix": "cancelled/t"}
    comfy.management.interrupt_current_processing()
    with torch.inference_mode(), pytest.raises(comfy.management.InterruptProcessingException):
        node.execute(samples={"samples": torch.randn(1, 16, 7, 4, 4)}, vae=vae, scaling="raw", memory_gb=0.0, **options)
    assert list((base / "output" / "cancelled").iterdir()) == []


def test_inspect_says_what_it_is(run):
    (report,) = run("KVAEInspectLatent", samples={"samples": torch.randn(1, 16, 4, 30, 40) * 2.1})
    assert "hunyuan_video or kvae_3d_1.0" in report
    assert "13 frames of 320 x 240 pixels" in report
    assert "it looks raw" in report


def test_save_and_load_a_latent(run, load, comfy, base):
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


def test_compare_two_vaes(run, load):
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
        with pytest.raises(ValueError, match="one of the two"):
            run("KVAECompare", vae_a=a, vae_b=b, **wrong)


def test_compare_with_a_stock_vae(run, load):
    import comfy.sd

    taehv = pytest.importorskip("comfy.taesd.taehv")  # ComfyUI's small HunyuanVideo VAE, untrained
    stock = comfy.sd.VAE(sd=taehv.TAEHV(latent_channels=16).half().state_dict())
    both, _, report = run("KVAECompare", vae_a=stock, vae_b=load(), pixels=sample_clip(6, 40, 48))
    assert both.shape == (5, 32, 96, 3)
    assert len(report.splitlines()) == 3


def with_hidden(cls):
    """A node class as the executor prepares it, with no prompt to hide in files."""
    hidden = type("Hidden", (), {"prompt": None, "extra_pnginfo": {"workflow": {"nodes": []}}})
    return type(cls.__name__, (cls,), {"hidden": hidden})
