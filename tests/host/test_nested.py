"""Latents with audio, as LTX-2 and Kandinsky 6 make them, pass through every node, and are saved and loaded whole."""

import sys

import pytest
import torch

from .conftest import with_hidden

Z = torch.randn(1, 16, 3, 4, 4)
AUDIO = torch.randn(1, 8, 26, 16)


@pytest.fixture(scope="session")
def nested(comfy):
    """Samples of ComfyUI that hold these parts."""
    module = pytest.importorskip("comfy.nested_tensor", reason="needs a ComfyUI with nested latents")
    return lambda *parts: module.NestedTensor(parts)


@pytest.fixture
def save(comfy, base):
    """Save a latent with our node; returns what the node returns, and the file's name for the nodes that load."""

    def save(latent, folder):
        out = with_hidden(comfy.classes["KVAESaveLatent"]).execute(latent, f"latents/{folder}/KVAE").args[0]
        (file,) = (base / "output" / "latents" / folder).iterdir()
        return out, f"latents/{folder}/{file.name} [output]"

    return save


def test_every_decoder_decodes_the_video_part(run, load, nested):
    vae, alone, both = load(), {"samples": Z}, {"samples": nested(Z, AUDIO)}
    options = {"vae": vae, "scaling": "raw", "memory_gb": 0.0}
    (image,) = run("KVAEDecode", samples=alone, **options)
    assert torch.equal(run("KVAEDecode", samples=both, **options)[0], image)
    side_by_side, *_ = run("KVAECompare", vae_a=vae, vae_b=vae, samples=both)
    assert torch.equal(side_by_side[:, :, :32], image)


def test_vae_decode_decodes_the_video_part_where_it_knows_nested_latents(run, load, nested, comfyui_path):
    source = (comfyui_path / "nodes.py").read_text(encoding="utf-8").split("class VAEDecode:")[1].split("class ")[0]
    if "is_nested" not in source:
        pytest.skip("needs a ComfyUI whose VAE Decode reads nested latents")
    (image,) = run("VAEDecode", samples={"samples": Z}, vae=load())
    assert torch.equal(run("VAEDecode", samples={"samples": nested(Z, AUDIO)}, vae=load())[0], image)


def test_convert_keeps_audio_masks_and_all_that_others_wrote(run, nested):
    adapter, _ = run("KVAELoadAdapter", adapter_name="h2k.safetensors")
    mask = nested(torch.ones(1, 1, 3, 4, 4), torch.zeros_like(AUDIO))
    rest = {"noise_mask": mask, "batch_index": [3], "type": "audio", "downscale_ratio_spacial": 8, "kvae_frames": 7}
    (converted,) = run("KVAEConvertLatent", samples={"samples": nested(Z, AUDIO), **rest}, adapter=adapter)
    (alone,) = run("KVAEConvertLatent", samples={"samples": Z}, adapter=adapter)
    video, audio = converted.pop("samples").unbind()
    assert torch.equal(video, alone["samples"])
    assert audio is AUDIO
    assert converted == {**rest, "kvae_space": "kvae_3d_1.0"}


def test_a_clip_is_encoded_into_a_latent_with_audio(run, load, nested):
    vae, clip = load(), torch.rand(10, 33, 32, 3)  # padded to 13 frames, cropped to 32 x 32
    (alone,) = run("KVAEEncode", pixels=clip, vae=vae)
    mask = nested(torch.ones(1, 1, 4, 4, 4), torch.zeros_like(AUDIO))
    rest = {"noise_mask": mask, "batch_index": [3], "sample_rate": 44100}
    of_the_old_video = {"kvae_frames": 13, "kvae_weights": "of another VAE"}
    both = {"samples": nested(torch.zeros(1, 16, 4, 4, 4), AUDIO), **rest, **of_the_old_video}
    before = dict(both)
    (latent,) = run("KVAEEncode", pixels=clip, vae=vae, samples=both)
    video, audio = latent.pop("samples").unbind()
    assert torch.equal(video, alone.pop("samples"))
    assert audio is AUDIO
    assert latent == {**rest, **alone}
    assert alone["kvae_frames"] == 10
    assert both == before  # other nodes have it, too


def test_a_clip_takes_the_place_of_a_latent_without_audio_and_keeps_its_mask(run, load):
    mask = torch.ones(1, 1, 3, 4, 4)
    latent = {"samples": torch.zeros_like(Z), "noise_mask": mask}
    (latent,) = run("KVAEEncode", pixels=torch.rand(9, 32, 32, 3), vae=load(), samples=latent)
    assert latent["noise_mask"] is mask
    assert latent["samples"].abs().sum() > 0


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (torch.zeros(1, 16, 3, 4, 6), r"samples is \[1, 16, 3, 4, 6\], 1 x 9 frames of 48 x 32"),
        (torch.zeros(1, 16, 5, 4, 4), r"gives a latent \[1, 16, 3, 4, 4\]; .* 1 x 17 frames of 32 x 32"),
        (torch.zeros(2, 16, 3, 4, 4), r"2 x 9 frames of 32 x 32\. Make one as long and as large as the other"),
        (torch.zeros(1, 32, 3, 2, 2), r"This is a latent of hunyuan_video_1.5.*; expected a hunyuan_video latent"),
    ],
)
def test_a_latent_of_another_size_is_refused_before_the_clip_is_encoded(run, load, nested, old, message):
    vae = load()
    vae.encode = lambda _: pytest.fail("encoded")
    with pytest.raises(ValueError, match=message):
        run("KVAEEncode", pixels=torch.rand(9, 32, 32, 3), vae=vae, samples={"samples": nested(old, AUDIO)})


def test_vae_decode_tiled_decodes_the_video_part_where_it_knows_nested_latents(run, load, nested, comfyui_path):
    source = (comfyui_path / "nodes.py").read_text(encoding="utf-8").split("class VAEDecodeTiled:")[1].split("class ")
    if "is_nested" not in source[0]:
        pytest.skip("needs a ComfyUI whose VAE Decode (Tiled) reads nested latents")
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 16, "temporal_overlap": 8}
    (image,) = run("VAEDecodeTiled", samples={"samples": Z}, vae=load(), **tiles)
    assert torch.equal(run("VAEDecodeTiled", samples={"samples": nested(Z, AUDIO)}, vae=load(), **tiles)[0], image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_latent_with_audio_is_saved_whole_and_loaded_bit_for_bit(run, save, nested, dtype):
    latent = {"samples": nested(Z.to(dtype), AUDIO.to(dtype)), "kvae_space": "hunyuan_video", "kvae_frames": 7}
    passed_on, name = save(latent, f"nested_{str(dtype)[6:]}")
    assert passed_on is latent
    again, report = run("KVAELoadLatent", file=name, scaling="auto")
    assert type(again["samples"]) is type(latent["samples"])
    for part, saved in zip(again["samples"].unbind(), latent["samples"].unbind(), strict=True):
        assert part.dtype == dtype
        assert torch.equal(part, saved)
    assert (again["kvae_space"], again["kvae_frames"]) == ("hunyuan_video", 7)
    assert "With it comes audio, [1, 8, 26, 16]" in report
    (stock,) = run("LoadLatent", latent=name)  # ComfyUI's own loader reads the video part
    assert torch.equal(stock["samples"], Z.to(dtype).float())


def test_what_a_sampler_needs_is_saved_with_a_latent(run, save, nested):
    mask = nested(torch.rand(1, 1, 3, 4, 4), torch.zeros_like(AUDIO))
    rest = {"noise_mask": mask, "batch_index": [3], "sample_rate": 44100}
    _, name = save({"samples": nested(Z, AUDIO), **rest}, "nested_mask")
    again, report = run("KVAELoadLatent", file=name, scaling="auto")
    assert type(again["noise_mask"]) is type(mask)
    for part, saved in zip(again.pop("noise_mask").unbind(), mask.unbind(), strict=True):
        assert torch.equal(part, saved)
    again.pop("samples")
    assert again == {"batch_index": [3], "sample_rate": 44100}
    assert "It has a noise mask of part 1, [1, 1, 3, 4, 4]" in report
    assert "It has a noise mask of part 1" in run("KVAEInspectLatent", samples={"samples": Z, **rest})[0]


def test_the_mask_of_a_latent_without_audio_is_saved_too(run, save):
    mask = torch.rand(1, 1, 32, 32)
    _, name = save({"samples": Z, "noise_mask": mask}, "mask")
    assert torch.equal(run("KVAELoadLatent", file=name, scaling="auto")[0]["noise_mask"], mask)


def test_the_audio_of_a_loaded_latent_is_split_off_by_comfyui(run, comfy, save, nested):
    if "LTXVSeparateAVLatent" not in comfy.classes:
        pytest.skip("needs a ComfyUI that splits audio off")
    _, name = save({"samples": nested(Z, AUDIO)}, "split")
    latent, _ = run("KVAELoadLatent", file=name, scaling="auto")
    video, audio = run("LTXVSeparateAVLatent", av_latent=latent)
    assert torch.equal(video["samples"], Z)
    assert torch.equal(audio["samples"], AUDIO)


def test_a_comfyui_without_nested_latents_loads_the_video_part_and_says_so(run, comfy, save, nested, monkeypatch):
    _, name = save({"samples": nested(Z, AUDIO)}, "older")
    package = comfy.classes["KVAELoadLatent"].__module__.rpartition(".")[0]
    monkeypatch.setattr(sys.modules[f"{package}.latent_dict"], "NestedTensor", None)
    latent, report = run("KVAELoadLatent", file=name, scaling="auto")
    assert torch.equal(latent["samples"], Z)
    assert "This ComfyUI has no latents with audio: the output is the video part." in report


def test_inspect_reports_the_audio_beside_the_video(run, nested):
    (report,) = run("KVAEInspectLatent", samples={"samples": nested(Z, torch.zeros(1, 8, 26, 16))})
    assert "It decodes to 9 frames of 32 x 32 pixels" in report
    assert "With it comes audio, [1, 8, 26, 16], float32 on cpu. The model's audio VAE decodes it" in report
    assert report.endswith("All values are equal: this part is empty, not sampled yet.")


def test_nested_samples_without_a_part_are_refused(run, nested):
    with pytest.raises(ValueError, match="nested, but has no part"):
        run("KVAEInspectLatent", samples={"samples": nested()})
