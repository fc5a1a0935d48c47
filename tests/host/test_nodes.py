"""The pack's own nodes in ComfyUI, beyond Load KVAE."""

import os

import av
import pytest
import torch
from safetensors.torch import save_file

from kvae_comfyui.serving.latent_files import save_latent
from kvae_comfyui.serving.sample_clip import sample_clip

NATIVE = "KVAE (native)"


class Nested:
    """Like ComfyUI's latents of video with audio."""

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


BAD_LATENTS = {
    "None": (None, "This is a NoneType without samples"),
    "a list": ([1], "This is a list without samples"),
    "no samples": ({}, "This is a dict without samples"),
    "samples None": ({"samples": None}, "This latent is a NoneType"),
    "samples a list": ({"samples": [[1.0]]}, "This latent is a list"),
    "numpy": ({"samples": torch.zeros(1, 16, 1, 4, 4).numpy()}, "This latent is a ndarray"),
    "fp8": ({"samples": torch.zeros(1, 16, 1, 4, 4).to(torch.float8_e4m3fn)}, "This latent is of float8_e4m3fn"),
    "sparse": ({"samples": torch.ones(1, 16, 1, 4, 4).to_sparse()}, "This latent is sparse_coo"),
    "meta": ({"samples": torch.zeros(1, 16, 1, 4, 4, device="meta")}, "on the meta device"),
    "int8": ({"samples": torch.zeros(1, 16, 1, 4, 4, dtype=torch.int8)}, "This latent is of int8"),
    "bool": ({"samples": torch.zeros(1, 16, 1, 4, 4, dtype=torch.bool)}, "This latent is of bool"),
    "complex": ({"samples": torch.zeros(1, 16, 1, 4, 4, dtype=torch.complex64)}, "This latent is of complex64"),
    "NaN": ({"samples": torch.full((1, 16, 1, 4, 4), torch.nan)}, "256 of 256 values of this latent are NaN"),
    "frames in words": ({"samples": torch.zeros(1, 16, 1, 4, 4), "kvae_frames": "one"}, "kvae_frames of this latent"),
    "a space in numbers": ({"samples": torch.zeros(1, 16, 1, 4, 4), "kvae_space": 5}, "kvae_space of this latent is 5"),
}
HARMLESS = {  # entries that a node does not read, or that it reports
    "KVAEDecode": (),
    "KVAEConvertLatent": ("frames in words",),
    "KVAEInspectLatent": ("frames in words", "NaN"),
    "KVAESaveLatent": (),
}
REFUSED = [(node, name) for node, harmless in HARMLESS.items() for name in BAD_LATENTS if name not in harmless]


@pytest.mark.parametrize(("node", "name"), REFUSED)
def test_a_bad_latent_is_refused_in_one_sentence(run, load, comfy, base, node, name):
    latent, words = BAD_LATENTS[name]
    with pytest.raises(ValueError, match=words) as caught:
        if node == "KVAEDecode":
            run(node, samples=latent, vae=load(), scaling="raw", memory_gb=0.0)
        elif node == "KVAEConvertLatent":
            run(node, samples=latent, adapter=run("KVAELoadAdapter", adapter_name="h2k.safetensors")[0])
        elif node == "KVAESaveLatent":
            with_hidden(comfy.classes[node]).execute(samples=latent, filename_prefix="bad/KVAE")
        else:
            run(node, samples=latent)
    assert "\n" not in str(caught.value)
    assert not list((base / "output").glob("bad/*"))


@pytest.mark.parametrize("scaling", ["raw", "scaled"])
def test_a_nan_in_the_second_clip_is_refused_before_the_first_is_decoded(run, load, scaling):
    """Also by a stock decode after ours, which does not share our check."""
    vae, z, seen = load(), torch.randn(2, 16, 2, 4, 4), []
    vae.first_stage_model.on_progress = lambda *done: seen.append(done)
    run("KVAEDecode", samples={"samples": z}, vae=vae, scaling=scaling, memory_gb=0.0)
    assert len(seen) == 2
    z[1, 3, 1, 2, 2] = torch.nan
    for node, settings in (("KVAEDecode", {"scaling": scaling, "memory_gb": 0.0}), ("VAEDecode", {})):
        with pytest.raises(ValueError, match="1 of 1024 values of this latent are NaN"):
            run(node, samples={"samples": z}, vae=vae, **settings)
    assert len(seen) == 2


def test_invalid_settings_are_refused(run, load):
    latent, vae = {"samples": torch.zeros(1, 16, 1, 4, 4)}, load()
    with pytest.raises(ValueError, match="scaling is 'other'; expected raw or scaled"):
        run("KVAEDecode", samples=latent, vae=vae, scaling="other", memory_gb=0.0)
    for bad in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="memory_gb is .*; expected a number of GB"):
            run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=bad)
        with pytest.raises(ValueError, match="memory_gb is .*; expected a number of GB"):
            load(memory_gb=bad)
    for wrong in ({"latents": "native"}, {"dtype": "fp8"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is '.*'; expected one of "):
            load(**wrong)
    with pytest.raises(ValueError, match="This adapter is a NoneType; expected one from Load Latent Adapter"):
        run("KVAEConvertLatent", samples=latent, adapter=None)


def test_bad_pixels_and_too_many_pixels_are_refused_before_any_work(run, load):
    clip, vae = sample_clip(5, 32, 32), load()
    clip[2, 3, 4, 1] = torch.nan
    for node in ("KVAEEncode", "VAEEncode"):
        with pytest.raises(ValueError, match="1 of 15360 values of these pixels are NaN or infinite"):
            run(node, pixels=clip, vae=vae)
    for bad, words in ((None, "a NoneType"), ([1.0], "a list"), ((clip * 255).byte(), "of uint8")):
        with pytest.raises(ValueError, match=f"These pixels are {words}"):
            run("KVAEEncode", pixels=bad, vae=vae)
    huge = torch.zeros(1)
    with pytest.raises(MemoryError, match="There is no memory for 120,000,000 GB of pixels"):
        run("KVAEEncode", pixels=huge.expand(1000, 10**5, 10**8, 3), vae=vae)
    latent = {"samples": huge.expand(1, 16, 1, 12_500, 12_500_000)}
    with pytest.raises(MemoryError, match="There is no memory for 120,000 GB of frames, 1 x 1 of 100000000x100000"):
        run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    with pytest.raises(MemoryError, match="There is no memory for 120,000 GB of frames"):
        run("KVAESampleClip", width=10**8, height=10**5, length=1)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("x" * 5000, "a part of over 200 bytes"),
        ("a\0b", "not a name that a file can have"),
        ("deep/" + "й" * 120, "over 200"),
    ],
    ids=["long", "NUL", "long in UTF-8"],
)
def test_a_prefix_that_is_not_a_file_name_leaves_nothing(comfy, base, prefix, words):
    before = sorted((base / "output").rglob("*"))
    with pytest.raises(ValueError, match=words):
        with_hidden(comfy.classes["KVAESaveLatent"]).execute(
            samples={"samples": torch.zeros(1, 16, 1, 4, 4)}, filename_prefix=prefix
        )
    assert sorted((base / "output").rglob("*")) == before


@pytest.fixture
def elsewhere(base, tmp_path):
    """A good latent file outside of ComfyUI's folders, and names that would lead to it."""
    path = tmp_path / "secret.latent"
    save_latent(path, torch.zeros(1, 16, 1, 4, 4), None, None, {})
    link = base / "input" / "link.latent"
    link.symlink_to(path)
    up = os.path.relpath(path, base / "input")
    yield [
        str(path),
        up,
        f"{os.path.relpath(path, base / 'output')} [output]",
        "link.latent",
        "a\0b",
        "",
        ".",
        "[output]",
    ]
    link.unlink()


def test_latents_are_read_from_comfyuis_folders_alone(run, comfy, elsewhere):
    """Both the check of the prompt and its run refuse other files, and do not tell whether they exist."""
    node = comfy.classes["KVAELoadLatent"]
    for name in elsewhere:
        with pytest.raises(ValueError, match="no such latent file. Put it into ComfyUI's input folder"):
            run("KVAELoadLatent", file=name, scaling="auto")
        assert node.validate_inputs(name) == node.validate_inputs("absent.latent").replace("absent.latent", name)
    assert not set(elsewhere) & set(node.define_schema().inputs[0].options)
    for name in (5, ["1"]):
        assert "no such latent file" in node.validate_inputs(name)


def test_a_latent_that_can_be_read_in_two_ways_asks(run, base):
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
        with pytest.raises(ValueError, match="connect either pixels or samples"):
            run("KVAECompare", vae_a=a, vae_b=b, **wrong)


def test_compare_with_a_stock_vae(run, load):
    import comfy.sd

    # ComfyUI's small HunyuanVideo VAE, untrained
    taehv = pytest.importorskip("comfy.taesd.taehv", reason="needs a ComfyUI with TAEHV")
    stock = comfy.sd.VAE(sd=taehv.TAEHV(latent_channels=16).half().state_dict())
    both, _, report = run("KVAECompare", vae_a=stock, vae_b=load(), pixels=sample_clip(6, 40, 48))
    assert both.shape == (5, 32, 96, 3)
    assert len(report.splitlines()) == 3


def with_hidden(cls):
    """A node class as the executor prepares it, with no prompt to hide in files."""
    hidden = type("Hidden", (), {"prompt": None, "extra_pnginfo": {"workflow": {"nodes": []}}})
    return type(cls.__name__, (cls,), {"hidden": hidden})
