"""Load KVAE: one message for what is missing, which says where to get it, and a report of what was loaded."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from kvae_comfyui.adapters.networks import PointwiseNet
from kvae_comfyui.adapters.published import PUBLISHED_FILES, published_address
from kvae_comfyui.kvae import load_kvae
from small_models import clip, small

from .conftest import HUNYUAN_15, NATIVE, T4S16
from .test_server import LOAD

HUNYUAN = "HunyuanVideo / Kandinsky 5"

DECODE = {
    "2": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 1, "batch_size": 1}},
    "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
}


def errors(server, **inputs) -> list[str]:
    """What the server says of Load KVAE with these inputs."""
    load = {"class_type": "KVAELoad", "inputs": LOAD | inputs}
    answer = server.post("/prompt", {"prompt": DECODE | {"1": load}})
    return [error["details"] for error in answer["node_errors"]["1"]["errors"]]


def test_a_missing_kvae_is_said_once_under_its_input_in_a_short_line(server):
    (said,) = errors(server, kvae_name="KVAE-3D-1.0.safetensors")
    address = "https://huggingface.co/kandinskylab/KVAE-3D-1.0/resolve/main/model.safetensors"
    assert said == (
        "kvae_name - KVAE-3D-1.0.safetensors is not in models/vae. "
        f"Download {address}, save it there under this name, press R."
    )


@pytest.mark.parametrize("name", ["decode_adapter", "encode_adapter"])
def test_a_missing_adapter_is_said_once_under_its_own_input(server, comfyui_path, name):
    if "Combo.io_type" not in (comfyui_path / "execution.py").read_text(encoding="utf-8"):
        pytest.skip("needs a ComfyUI that checks the lists of V3 nodes; in this one the error comes when the node runs")
    (said,) = errors(server, **{name: "copy.safetensors"})
    assert said.startswith(f"{name}: 'copy.safetensors' not in ")


PIPELINE = "Kandinsky-6.0-VSR-distilled2steps-5s-Diffusers/vae"


@pytest.fixture
def pipelines(base):
    """models/diffusion_models with Kandinsky 6's super-resolution and another model's pipeline, for one test."""
    kvae = small("2.0-t4s16")
    config = {"vae_type": "video-kvae", "ch": 8, "ch_mult": [0.5, 1, 1, 2, 2], "norm_type": "rms_norm"}
    config |= {"decoder_ch": 16, "decoder_ch_mult": [0.25, 1, 1, 1, 2], "num_res_blocks": 1, "z_channels": 64}
    config |= {"temporal_compress_start_level": 1, "downsample_version": 2, "padding_mode": "zeros"}
    root = base / "models" / "diffusion_models"
    for folder, values in ((PIPELINE, config), ("HunyuanVideo/vae", {"_class_name": "AutoencoderKLHunyuanVideo"})):
        (root / folder).mkdir(parents=True)
        (root / folder / "config.json").write_text(json.dumps(values))
        save_file(kvae.state_dict(), root / folder / "diffusion_pytorch_model.safetensors")
    yield root
    shutil.rmtree(root)


def test_the_kvae_of_kandinsky_6_is_listed_by_its_pipeline_and_loads(comfy, load, run, pipelines):
    inputs = {each.id: each for each in comfy.classes["KVAELoad"].define_schema().inputs}
    assert [name for name in inputs["kvae_name"].options if name.endswith("vae")] == [PIPELINE]
    vae = load(kvae_name=PIPELINE, latents=NATIVE)
    expected = load_kvae(pipelines / PIPELINE)
    x = clip(expected, 5)
    (found,) = run("VAEEncode", vae=vae, pixels=(x[0].movedim(0, -1) + 1) * 128 / 255)
    torch.testing.assert_close(found["samples"], expected.encode(x), rtol=1e-3, atol=1e-3)
    shutil.rmtree(pipelines / PIPELINE)
    said = comfy.classes["KVAELoad"].validate_inputs(PIPELINE)
    assert said == f"{PIPELINE} is not in models/diffusion_models. Save it there, press R, or choose another file."


@pytest.fixture
def no_adapters(base):
    """models/latent_adapters without files, for one test."""
    folder = base / "models" / "latent_adapters"
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def test_without_adapters_the_message_says_where_they_are_and_what_they_are(load, no_adapters):
    with pytest.raises(ValueError, match="^No adapter in models/latent_adapters maps hunyuan_video → ") as caught:
        load()
    for name in PUBLISHED_FILES:
        assert published_address(name) in str(caught.value)
    assert "not for pictures" in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_that_does_not_say_what_it_maps_is_named(load, no_adapters):
    save_file(PointwiseNet(16, 16).state_dict(), no_adapters / "my_h2k.safetensors")
    (no_adapters / "other.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="my_h2k.safetensors does not say what it maps: choose it by name.") as caught:
        load()
    assert "other.safetensors" not in str(caught.value)
    load(decode_adapter="my_h2k.safetensors")


def test_a_deleted_folder_of_adapters_has_no_files(load, comfy, no_adapters):
    (no_adapters / "h2k.safetensors").write_bytes(b"damaged")

    def offered():
        inputs = {each.id: each for each in comfy.classes["KVAELoad"].define_schema().inputs}
        return inputs["decode_adapter"].options

    assert offered() == ["auto", "h2k.safetensors", "none"]
    shutil.rmtree(no_adapters)
    assert offered() == ["auto", "none"]
    load(latents="KVAE (native)")


def test_about_names_what_was_loaded(run, load):
    _, report = run("KVAELoad", **(LOAD | {"dtype": "fp32"}))
    assert report.startswith("KVAE.safetensors: fp32, 0.0 GB of weights\n")
    for part in ("through h2k.safetensors", "through k2h.safetensors", "psnr: 12.5", "1280x720: decode"):
        assert part in report


def test_what_a_kvae_cannot_serve_is_refused_with_what_it_can(run, load, comfy):
    with pytest.raises(ValueError, match="^KVAE.safetensors is kvae_3d_1.0, which cannot serve") as caught:
        load(latents=HUNYUAN_15)
    assert str(caught.value).endswith(f': set latents to "{HUNYUAN}" or "{NATIVE}".')
    with pytest.raises(
        ValueError, match="maps hunyuan_video → kvae_3d_2.0_t4s16 or back .* None is published"
    ) as caught:
        load(kvae_name=T4S16)  # it can, but there are no adapters
    assert str(caught.value).endswith(f'or choose latents "{HUNYUAN_15}" or "{NATIVE}".')
    with pytest.raises(ValueError, match="hunyuan.safetensors: this is a HunyuanVideo VAE"):
        load(kvae_name="hunyuan.safetensors", latents=HUNYUAN_15)


def test_auto_takes_the_adapters_of_an_included_kvae(run):
    """Those of its own space and weights, among all that are in the pack."""
    for name, latents, way in (("tiny KVAE", HUNYUAN, "hunyuan"), ("tiny KVAE 2.0-t4s16", HUNYUAN_15, "hunyuan15")):
        _, report = run("KVAELoad", **(LOAD | {"kvae_name": f"{name} (included)", "latents": latents, "dtype": "fp32"}))
        assert f"through tiny_{way}_to_kvae.safetensors" in report
        assert f"through tiny_kvae_to_{way}.safetensors" in report


def test_an_included_file_that_is_not_there_is_not_offered_and_its_name_is_an_error(comfy, run, monkeypatch):
    """So of a pack whose package leaves it out, and in workflows that name it all the same."""
    node = comfy.classes["KVAELoad"]
    folders = sys.modules[node.__module__.rpartition(".")[0] + ".folders"]
    name = "tiny KVAE 2.0-t4s16 (included)"
    assert name in node.define_schema().inputs[0].options and node.validate_inputs(name) is True
    monkeypatch.setitem(folders.INCLUDED, name, folders.ASSETS / "gone.safetensors")
    assert name not in node.define_schema().inputs[0].options
    said = f"{name} is missing: this pack has no gone.safetensors. Update the pack, or choose another file."
    assert node.validate_inputs(name) == said


def test_an_included_kvae_without_adapters_is_said_in_one_line(load):
    with pytest.raises(
        ValueError, match="This pack has no adapter hunyuan_video → .* or back for tiny KVAE 2.0"
    ) as found:
        load(kvae_name="tiny KVAE 2.0-t4s16 (included)", latents=HUNYUAN)
    assert str(found.value).endswith(f'choose latents "{HUNYUAN_15}" or "{NATIVE}".')


def test_the_page_is_told_what_each_kvae_can_serve(ours):
    """Of a file that is no KVAE it is told nothing."""
    _, settings = ours["KVAELoad"]["input"]["required"]["latents"]
    assert settings["options"] == [HUNYUAN, HUNYUAN_15, NATIVE]
    served = settings["served"]
    assert served["KVAE.safetensors"] == served["tiny KVAE (included)"] == [HUNYUAN, NATIVE]
    assert served[T4S16] == served["tiny KVAE 2.0-t4s16 (included)"] == settings["options"]
    assert "hunyuan.safetensors" not in served


def test_a_broken_link_among_the_files_hides_no_node(comfy, base):
    link = base / "models" / "vae" / "broken.safetensors"
    link.symlink_to(base / "absent")
    try:
        (latents,) = (each for each in comfy.classes["KVAELoad"].define_schema().inputs if each.id == "latents")
    finally:
        link.unlink()
    assert "KVAE.safetensors" in latents.as_dict()["served"]
    assert "broken.safetensors" not in latents.as_dict()["served"]
