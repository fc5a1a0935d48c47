"""A latent names the weights of the VAE that it is of, for as long as it is that latent, and for no other."""

import pytest
import torch

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import load_adapter, save_adapter
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.kvae import KVAE, load_kvae
from kvae_comfyui.kvae.load import save_kvae
from kvae_comfyui.kvae.signature import signature
from kvae_comfyui.serving.sample_clip import sample_clip
from kvae_comfyui.training.vaes import TINY_ADAPTERS

from .conftest import NATIVE, TINY, with_hidden
from .test_sampling import untrained_kandinsky5

INCLUDED, OTHER = "tiny KVAE (included)", "other_weights.safetensors"
RAW = {"scaling": "raw", "memory_gb": 0.0}
REFUSED = "a latent of this project's tiny KVAE .*; expected one of the kvae_3d_1.0 VAE whose signature begins"


@pytest.fixture
def other(base):
    """The name of a KVAE of the tiny one's shape with other weights, and of an adapter that reads for it what the
    included adapters write.
    """
    torch.manual_seed(5)
    kvae, theirs = KVAE(load_kvae(TINY).config).eval(), load_adapter(TINY_ADAPTERS["h2k"])
    files = base / "models" / "kvae" / OTHER, base / "models" / "latent_adapters" / "for_other.safetensors"
    save_kvae(files[0], kvae, torch.float16, {})
    weights = theirs.weights | {"kvae_3d_1.0": VAEWeights("", signature(kvae.state_dict()))}
    save_adapter(files[1], LatentAdapter(theirs.network, theirs.source, theirs.target, weights=weights))
    yield OTHER, files[1].name
    for file in files:
        file.unlink()


def encoded(run, load, **settings):
    (latent,) = run("KVAEEncode", pixels=sample_clip(5, 64, 64), vae=load(kvae_name=INCLUDED, **settings))
    return latent


def test_a_native_latent_is_refused_by_a_kvae_with_other_weights(run, load, other):
    latent, wrong = encoded(run, load, latents=NATIVE), load(kvae_name=other[0], latents=NATIVE)
    for node, settings in (("KVAEDecode", {}), ("KVAEDecodeToVideo", VIDEO)):
        with pytest.raises(ValueError, match=REFUSED) as caught:
            run(node, samples=latent, vae=wrong, **RAW, **settings)
        assert "\n" not in str(caught.value)
    run("KVAEDecode", samples=latent, vae=load(latents=NATIVE, dtype="bf16"), **RAW)  # the same weights, rounded
    run("VAEDecode", samples=latent, vae=wrong)  # it gets no names


VIDEO = {"fps": 24.0, "codec": "h264", "crf": 18, "filename_prefix": "video/names"}


def test_a_latent_through_adapters_fits_every_kvae_with_adapters_for_the_same_vae(run, load, other):
    latent = encoded(run, load)
    assert latent["kvae_space"] == "hunyuan_video"
    run("KVAEDecode", samples=latent, vae=load(kvae_name=INCLUDED), **RAW)
    run("KVAEDecode", samples=latent, vae=load(), **RAW)  # its adapters do not say what they are for
    run(
        "KVAEDecode",
        samples=latent,
        vae=load(kvae_name=other[0], decode_adapter=other[1], encode_adapter="none"),
        **RAW,
    )
    (report,) = run("KVAEInspectLatent", samples=latent)
    assert "It is of this project's tiny HunyuanVideo VAE (hunyuan_video)." in report


def test_what_is_no_longer_that_latent_is_refused_by_no_vae(run, load, other):
    pytest.importorskip("comfy.ldm.kandinsky5.model", reason="needs a ComfyUI with Kandinsky 5")
    latent, wrong = encoded(run, load, latents=NATIVE), load(kvae_name=other[0], latents=NATIVE)
    text = [[torch.randn(1, 4, 3584), {"pooled_output": torch.zeros(1, 768)}]]
    options = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    model = untrained_kandinsky5()
    (sampled,) = run("KSampler", model=model, positive=text, negative=text, latent_image=latent, **options)
    assert "kvae_weights" in sampled  # a sampler passes the entry on
    (scaled,) = run("LatentMultiply", samples=latent, multiplier=1.2)
    for each in (sampled, scaled):
        run("KVAEDecode", samples=each, vae=wrong, **RAW)
        (report,) = run("KVAEInspectLatent", samples=each)
        assert "It is of" not in report


def test_a_file_keeps_the_names(run, load, comfy, base, other):
    latent = encoded(run, load, latents=NATIVE)
    with_hidden(comfy.classes["KVAESaveLatent"]).execute(samples=latent, filename_prefix="latents/names/KVAE")
    (file,) = (base / "output" / "latents" / "names").iterdir()
    again, report = run("KVAELoadLatent", file=f"latents/names/{file.name} [output]", scaling="auto")
    assert again["kvae_weights"] == latent["kvae_weights"]
    assert "It is of this project's tiny KVAE (kvae_3d_1.0)." in report
    with pytest.raises(ValueError, match=REFUSED):
        run("KVAEDecode", samples=again, vae=load(kvae_name=other[0], latents=NATIVE), **RAW)


def test_a_converted_latent_names_what_the_adapter_was_made_for(run, load, base, other):
    adapter, _ = run("KVAELoadAdapter", adapter_name=other[1])
    latent = encoded(run, load)
    (converted,) = run("KVAEConvertLatent", samples=latent, adapter=adapter)
    run("KVAEDecode", samples=converted, vae=load(kvae_name=other[0], latents=NATIVE), **RAW)
    with pytest.raises(ValueError, match="expected one of this project's tiny KVAE"):
        run("KVAEDecode", samples=converted, vae=load(latents=NATIVE), **RAW)
    strange = dict(latent, kvae_weights=dict(latent["kvae_weights"], signature=[1.0] * 58, sha256=""))
    with pytest.raises(ValueError, match="a latent of the hunyuan_video VAE whose signature begins 1, 1, 1; expected"):
        run("KVAEConvertLatent", samples=strange, adapter=adapter)


def test_a_damaged_entry_is_reported(run, load):
    latent = dict(encoded(run, load), kvae_weights={"sha256": 5})
    with pytest.raises(ValueError, match="kvae_weights of this latent is damaged"):
        run("KVAEInspectLatent", samples=latent)
