"""Adapter files describe themselves; published ones are known by their keys; the rest is refused by name."""

import inspect
import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import shared
from kvae_comfyui.adapters.files import LatentAdapter, VAEWeights, load_adapter, save_adapter, weights_of
from kvae_comfyui.adapters.hybrid import HybridVAE
from kvae_comfyui.adapters.networks import Affine, Published, Residual
from kvae_comfyui.adapters.spaces import SPACES, space
from kvae_comfyui.kvae import KVAE, WeightsError, load_kvae, save_kvae
from kvae_comfyui.kvae.load import described_state
from kvae_comfyui.kvae.pixels import hunyuan_from_kvae, kvae_from_hunyuan
from kvae_comfyui.serving.serve import ServedVAE
from kvae_comfyui.serving.tiled import TiledVAE
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS, load_hunyuan_vae, load_kvae_for_training

H, K = space("hunyuan_video"), space("kvae_3d_1.0")


@pytest.mark.parametrize("network", [Affine(16, 16, 1), Residual(16, 16, 8, 1), Published(16, 16)], ids=type)
def test_round_trip(tmp_path, network):
    adapter = LatentAdapter(network, H, K, training={"pairs": 7}, metrics={"val_mse": 0.25})
    save_adapter(tmp_path / "a.safetensors", adapter)
    loaded = load_adapter(tmp_path / "a.safetensors", ("hunyuan_video", "kvae_3d_1.0"))
    assert (loaded.source, loaded.target) == (H, K)
    assert loaded.training_info == {"pairs": 7}
    assert loaded.metrics == {"val_mse": 0.25}
    z = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(z), adapter(z))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["source_space"] == "hunyuan_video"
    assert json.loads(metadata["network"])["in_channels"] == 16
    assert "x/127.5-1" in metadata["pixels"] and "raw" in metadata["latents"]


def test_published_files(tmp_path):
    original = shared("seed_adapters/adapter_hunyuan_to_kvae3d.safetensors")
    adapter = load_adapter(original)
    assert (adapter.source.name, adapter.target.name) == ("hunyuan_video", "kvae_3d_1.0")
    renamed = tmp_path / "mine.safetensors"
    shutil.copyfile(original, renamed)
    with pytest.raises(WeightsError, match="does not say which way it maps; name it adapter_hunyuan_to_kvae3d"):
        load_adapter(renamed)
    assert load_adapter(renamed, ("kvae_3d_1.0", "hunyuan_video")).source == K


def test_swapped_adapters_are_noticed(tmp_path, small_kvae):
    save_adapter(tmp_path / "h2k.safetensors", LatentAdapter(Affine(16, 16, 1), H, K))
    with pytest.raises(WeightsError, match="maps hunyuan_video → kvae_3d_1.0; expected .* the two files are swapped"):
        load_adapter(tmp_path / "h2k.safetensors", ("kvae_3d_1.0", "hunyuan_video"))
    k2h = LatentAdapter(Affine(16, 16, 1), K, H)
    with pytest.raises(WeightsError, match="the two adapters are swapped"):
        HybridVAE(small_kvae, decode_adapter=k2h)


def test_other_files_are_refused_by_name(tmp_path, small_kvae):
    save_file(small_kvae.state_dict(), tmp_path / "kvae.safetensors")
    with pytest.raises(WeightsError, match="this is a KVAE-3D; expected a latent adapter"):
        load_adapter(tmp_path / "kvae.safetensors")
    save_adapter(tmp_path / "a.safetensors", LatentAdapter(Affine(16, 16, 1), H, K))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, tmp_path / "b.safetensors", metadata | {"source_space": "sdxl"})
    with pytest.raises(WeightsError, match="no latent space is called 'sdxl'"):
        load_adapter(tmp_path / "b.safetensors")
    tensors.pop("affine.conv.bias")
    save_file(tensors, tmp_path / "c.safetensors", metadata)
    with pytest.raises(WeightsError, match="1 tensors do not fit its own description, first affine.conv.bias"):
        load_adapter(tmp_path / "c.safetensors")


def test_a_latent_of_another_space_is_named():
    adapter = LatentAdapter(Affine(16, 16, 1), H, K)
    with pytest.raises(ValueError, match=r"\[1, 32, 2, 4, 4\]; a hunyuan_video latent is \[B, 16, t, h, w\]"):
        adapter(torch.randn(1, 32, 2, 4, 4))


def test_hybrid_is_the_sum_of_its_parts(small_kvae):
    h2k = LatentAdapter(Affine(16, 16, 3), H, K).requires_grad_(False)
    k2h = LatentAdapter(Affine(16, 16, 3), K, H).requires_grad_(False)
    vae = HybridVAE(small_kvae, h2k, k2h)
    x = torch.rand(1, 3, 9, 32, 40) * 2 - 1
    z = vae.encode(x)
    assert torch.equal(z, k2h(small_kvae.encode(kvae_from_hunyuan(x))))
    assert torch.equal(vae.decode(z), hunyuan_from_kvae(small_kvae.decode(h2k(z))))
    assert vae.encode(x[:, :, :7]).shape[2] == 3  # 7 frames are padded to 9


def test_hybrid_with_one_adapter_says_what_is_missing(small_kvae):
    h2k = LatentAdapter(Affine(16, 16, 1), H, K)
    with pytest.raises(WeightsError, match="no kvae_3d_1.0 → hunyuan_video adapter .*adapter_kvae3d_to_hunyuan"):
        HybridVAE(small_kvae, decode_adapter=h2k).encode(torch.zeros(1, 3, 1, 32, 32))
    k2h = LatentAdapter(Affine(16, 16, 1), K, H)
    with pytest.raises(WeightsError, match="no hunyuan_video → kvae_3d_1.0 adapter .*adapter_hunyuan_to_kvae3d"):
        HybridVAE(small_kvae, encode_adapter=k2h).decode(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(WeightsError, match="needs an adapter"):
        HybridVAE(small_kvae)


def test_scaling_is_that_of_diffusers():
    for name, vae in (
        ("hunyuan_video", AutoencoderKLHunyuanVideo),
        ("hunyuan_video_1.5", AutoencoderKLHunyuanVideo15),
    ):
        assert inspect.signature(vae.__init__).parameters["scaling_factor"].default == SPACES[name].scaling_factor
    z = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(H.scale(z), z * 0.476986)
    torch.testing.assert_close(H.unscale(H.scale(z)), z)
    assert torch.equal(K.scale(z), z)
    assert H.latent_shape(33, 240, 320) == (16, 9, 30, 40)
    with pytest.raises(ValueError, match="no latent space is called 'wan'"):
        space("wan")


# ---- files of others


def rewritten(path, tensors=None, **metadata):
    """An adapter file with other metadata (None: without that entry), or other tensors."""
    save_adapter(path, LatentAdapter(Residual(16, 16, 8, 1), H, K))
    with safe_open(path, "pt") as file:
        old, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    said = {key: value for key, value in (said | metadata).items() if value is not None}
    save_file(old | (tensors or {}), path, said)
    return path


CHANNELS = {"in_channels": 16, "out_channels": 16}
NETWORK = {"name": "residual", "width": 8, "blocks": 1} | CHANNELS


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"network": json.dumps(NETWORK | {"width": 10**6})}, "width is 1000000; expected a whole number"),
        ({"network": json.dumps(NETWORK | {"width": 4000})}, "tensors do not fit its own description"),
        ({"network": json.dumps(NETWORK | {"width": -8})}, "width is -8"),
        ({"network": json.dumps(NETWORK | {"width": 0})}, "width is 0"),
        ({"network": json.dumps(NETWORK | {"width": True})}, "width is True"),
        ({"network": json.dumps(NETWORK | {"width": "8"})}, "width is '8'"),
        ({"network": json.dumps(NETWORK | {"blocks": 10**9})}, "1000000000 blocks in"),
        ({"network": json.dumps(NETWORK | {"blocks": 14})}, "do not fit its own description"),
        ({"network": json.dumps(NETWORK | {"in_channels": 32})}, "a network from 32 to 16 channels"),
        ({"network": json.dumps(NETWORK | {"name": "unet"})}, "no adapter network is called 'unet'"),
        ({"network": json.dumps(NETWORK | {"name": None})}, "no adapter network is called 'None'"),
        ({"network": json.dumps(NETWORK | {"layers": 3})}, "does not take these settings"),
        (
            {"network": json.dumps({"name": "affine", "in_channels": 16, "out_channels": 16, "kernel": 2})},
            "kernel is 2",
        ),
        (
            {"network": json.dumps({"name": "published", "in_channels": 16, "out_channels": 16, "width": 7})},
            "divisible",
        ),
        ({"network": "null"}, "expected an object"),
        ({"network": "[1]"}, "expected an object"),
        ({"network": "7"}, "expected an object"),
        ({"network": "{}"}, "'name'"),
        ({"network": None}, "'network'"),
        ({"network": "[" * 100_000}, "nested too deeply"),
        ({"training": "[]"}, "expected an object"),
        ({"training": '{"a":' * 100_000}, "nested too deeply"),
        ({"metrics": '"good"'}, "expected an object"),
        ({"weights": "[]"}, "expected an object"),
        ({"weights": '{"kvae_3d_1.0": 5}'}, "expected an object"),
        ({"weights": '{"kvae_3d_1.0": {"signature": ["a"]}}'}, "signature is ['a']"),
        ({"source_space": None}, "'source_space'"),
        ({"source_space": "sdxl"}, "no latent space is called 'sdxl'"),
        ({"format": "kvae-latent-adapter/2"}, "of the format kvae-latent-adapter/2; kvae-latent-adapter/1 is known"),
        ({"format": None}, "a latent adapter that does not say what it maps"),
    ],
    ids=lambda each: "" if isinstance(each, str) else "-".join(f"{k} {str(v)[:40]}" for k, v in each.items()),
)
def test_an_adapter_is_what_its_file_holds_or_refused_in_one_line(tmp_path, metadata, words):
    """Before anything of the size that it claims is built."""
    path = rewritten(tmp_path / "a.safetensors", **metadata)
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_a_newer_version_adds_is_left_out(tmp_path):
    weights = json.dumps({"kvae_3d_1.0": {"sha256": "ab", "signature": [1.0], "colour": "red"}})
    adapter = load_adapter(rewritten(tmp_path / "a.safetensors", weights=weights, author="me"))
    assert adapter.weights == {"kvae_3d_1.0": VAEWeights("ab", (1.0,))}


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    for bad, words in (
        (torch.full((16,), torch.nan), "affine.conv.bias holds values that are not finite"),
        (torch.ones(16, dtype=torch.int32), "affine.conv.bias is of torch.int32; expected weights of a float type"),
    ):
        with pytest.raises(WeightsError, match=words):
            load_adapter(rewritten(tmp_path / "a.safetensors", {"affine.conv.bias": bad}))
    half = rewritten(tmp_path / "a.safetensors", {"affine.conv.bias": torch.ones(16).half()})
    assert {parameter.dtype for parameter in load_adapter(half).parameters()} == {torch.float32}


def test_no_folders_of_others_are_shown():
    adapter = LatentAdapter(
        Affine(16, 16, 1),
        H,
        K,
        {"config": {"latent_root": "/home/ann/latents", "out_h2k": r"C:\Users\ann\h.safetensors", "roots": ["/a/b"]}},
        {"report": "/home/ann/report.html", "sampling": "train/uniform"},
    )
    about = adapter.about()
    assert "ann" not in about and "/a" not in about
    for part in ("'latents'", "'h.safetensors'", "['b']", "report: report.html", "train/uniform"):
        assert part in about


# ---- frozen, and where the KVAE is


def test_a_loaded_adapter_is_frozen_and_a_decode_builds_no_graph(tmp_path, small_kvae):
    for name, direction in (("h2k", (H, K)), ("k2h", (K, H))):
        save_adapter(tmp_path / f"{name}.safetensors", LatentAdapter(Residual(16, 16, 8, 1), *direction))
    h2k, k2h = (load_adapter(tmp_path / f"{name}.safetensors") for name in ("h2k", "k2h"))
    assert not any(parameter.requires_grad for parameter in (*h2k.parameters(), *k2h.parameters()))
    vae = HybridVAE(small_kvae, h2k, k2h)
    z = vae.encode(torch.zeros(1, 3, 5, 32, 32))
    assert not z.requires_grad
    assert not vae.decode(z).requires_grad
    assert not any(frames.requires_grad for frames in vae.decode_stream(z))
    assert HybridVAE(small_kvae, LatentAdapter(Affine(16, 16), H, K)).decode(z).requires_grad  # one to train


@pytest.mark.parametrize("moved", ["before", "after", "as a whole"])
def test_adapters_go_where_the_kvae_is(small_kvae, moved):
    """The meta device stands in for a GPU: it too refuses to compute with tensors of the CPU."""
    h2k, k2h = LatentAdapter(Affine(16, 16), H, K), LatentAdapter(Affine(16, 16), K, H)
    if moved == "before":
        small_kvae.to("meta")
    vae = HybridVAE(small_kvae, h2k, k2h)
    if moved != "before":
        (vae if moved == "as a whole" else small_kvae).to("meta")
    z = vae.encode(torch.zeros(1, 3, 5, 32, 32))
    assert z.is_meta and z.shape == (1, 16, 2, 4, 4)
    x = vae.decode(torch.zeros(1, 16, 2, 4, 4))
    assert x.is_meta and x.shape == (1, 3, 5, 32, 32)


def test_what_is_spoilt_is_not_decoded_nor_encoded(small_kvae):
    vae = HybridVAE(small_kvae, LatentAdapter(Affine(16, 16), H, K), LatentAdapter(Affine(16, 16), K, H))
    z, x = torch.zeros(1, 16, 2, 4, 4), torch.zeros(1, 3, 5, 32, 32)
    z[0, 3, 1, 2, 2], x[0, 0, 0, 0, 0] = torch.nan, torch.inf
    for decode in (vae.decode, lambda z: next(vae.decode_stream(z))):
        with pytest.raises(ValueError, match="1 of 512 values of this latent are NaN or infinite"):
            decode(z)
        for bad in (z.to(torch.int8), torch.zeros_like(z, dtype=torch.complex64), torch.zeros_like(z) > 0):
            with pytest.raises(ValueError, match="This latent is of .*; expected a tensor of float32"):
                decode(bad)
    with pytest.raises(ValueError, match="1 of 15360 values of these pixels are NaN or infinite"):
        vae.encode(x)


# ---- made for which weights


@pytest.fixture
def tiny():
    return {name: load_adapter(path) for name, path in TINY_ADAPTERS.items()}


def test_the_embedded_adapters_know_the_embedded_vaes(tiny):
    vaes = load_hunyuan_vae("tiny", "cpu"), load_kvae_for_training("tiny", "cpu")
    expected = {vae.space.name: VAEWeights(vae.digest, vae.signature) for vae in vaes}
    assert tiny["h2k"].weights == tiny["k2h"].weights == expected


@pytest.mark.parametrize("vae", [HybridVAE, ServedVAE, TiledVAE])
def test_an_adapter_of_other_weights_is_refused(tiny, small_kvae, vae):
    other = KVAE(load_kvae(TINY["kvae"]).config)  # of one shape with the tiny one
    for kvae in (small_kvae, other):
        for roles in ({"decode_adapter": tiny["h2k"]}, {"encode_adapter": tiny["k2h"]}):
            with pytest.raises(WeightsError, match="made for a kvae_3d_1.0 VAE with other weights"):
                vae(kvae, **roles)
    published = LatentAdapter(Published(16, 16), H, K)  # says nothing of it
    assert vae(small_kvae, decode_adapter=published)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_weights_in_another_file_are_accepted(tmp_path, tiny, dtype):
    save_kvae(tmp_path / "converted.safetensors", load_kvae(TINY["kvae"]), dtype, {})
    for loaded_as in (torch.float32, torch.bfloat16):
        assert HybridVAE(load_kvae(tmp_path / "converted.safetensors", loaded_as), tiny["h2k"], tiny["k2h"])
    save_file(described_state(load_kvae(TINY["kvae"], dtype)), tmp_path / "saved.safetensors")
    assert HybridVAE(load_kvae(tmp_path / "saved.safetensors"), tiny["h2k"], tiny["k2h"])


def test_a_pair_for_two_foreign_vaes_is_refused(tiny):
    changed = {
        "hunyuan_video": VAEWeights("", tuple(-value for value in tiny["k2h"].weights["hunyuan_video"].signature))
    }
    k2h = LatentAdapter(tiny["k2h"].network, K, H, weights=changed)
    with pytest.raises(WeightsError, match="made for hunyuan_video VAEs with different weights"):
        HybridVAE(load_kvae(TINY["kvae"]), tiny["h2k"], k2h)


def test_the_weights_it_was_made_for_travel_with_the_file(tmp_path, tiny):
    save_adapter(tmp_path / "copy.safetensors", tiny["h2k"])
    assert load_adapter(tmp_path / "copy.safetensors").weights == tiny["h2k"].weights
    assert weights_of(tmp_path / "copy.safetensors")["kvae_3d_1.0"] == tiny["h2k"].weights["kvae_3d_1.0"].signature
