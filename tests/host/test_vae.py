"""The VAE that Load KVAE returns, in ComfyUI's own nodes."""

import pytest
import torch

from kvae_comfyui.adapters import HybridVAE, LatentAdapter, latent_space, load_adapter, save_adapter
from kvae_comfyui.adapters.hybrid import from_kvae_pixels, to_kvae_pixels
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.adapters.weights import VAEWeights
from kvae_comfyui.kvae.signature import signature
from kvae_comfyui.serving.host_vae import to_image
from kvae_comfyui.serving.sample_clip import sample_clip
from kvae_comfyui.training.vaes import TINY_ADAPTERS

Z = torch.randn(1, 16, 7, 4, 6, generator=torch.Generator().manual_seed(1))  # 25 frames: segments of 17 and 8


@pytest.fixture
def hybrid(base, tiny_kvae):
    adapters = base / "models" / "latent_adapters"
    return HybridVAE(tiny_kvae, load_adapter(adapters / "h2k.safetensors"), load_adapter(adapters / "k2h.safetensors"))


def test_stock_decode_is_hybrid_decode_bit_for_bit(run, load, hybrid):
    (image,) = run("VAEDecode", vae=load(), samples={"samples": Z})
    with torch.no_grad():
        expected = ((hybrid.decode(Z) + 1) / 2).clamp(0, 1)
    assert image.shape == (25, 32, 48, 3)
    assert torch.equal(image, expected[0].movedim(0, -1))


def test_stock_encode_is_hybrid_encode(run, load, hybrid):
    clip = sample_clip(9, 32, 48)
    (latent,) = run("VAEEncode", vae=load(), pixels=clip)
    with torch.no_grad():
        expected = hybrid.encode(clip.movedim(-1, 0)[None] * 2 - 1)
    assert torch.equal(latent["samples"], expected)


def test_native_latents_are_those_of_kvae_and_stock_encode_drops_frames_beyond_4n_1(run, load, tiny_kvae):
    clip = sample_clip(12, 32, 48)
    (latent,) = run("VAEEncode", vae=load(latents="KVAE (native)"), pixels=clip)
    with torch.no_grad():
        expected = tiny_kvae.encode(to_kvae_pixels(clip[:9].movedim(-1, 0)[None] * 2 - 1))
    assert torch.equal(latent["samples"], expected)  # stock nodes count 9 of 12 frames
    (image,) = run("VAEDecode", vae=load(latents="KVAE (native)"), samples=latent)
    with torch.no_grad():
        expected = from_kvae_pixels(tiny_kvae.decode(latent["samples"]))
    assert torch.equal(image, ((expected + 1) / 2).clamp(0, 1)[0].movedim(0, -1))


def test_batches_are_decoded_one_by_one(run, load):
    vae = load()
    both = torch.cat([Z, Z.flip(2)])
    (image,) = run("VAEDecode", vae=vae, samples={"samples": both})
    one = [run("VAEDecode", vae=vae, samples={"samples": z[None]})[0] for z in both]
    assert torch.equal(image, torch.cat(one))


def test_stock_tiled_nodes_use_our_tiles(run, load):
    vae = load()
    z = torch.randn(1, 16, 7, 12, 12)
    served = vae.first_stage_model
    with torch.no_grad():
        expected = to_image(served.decode_tiled(z, 8, 8, 2))[0].movedim(0, -1)
    (image,) = run("VAEDecodeTiled", vae=vae, samples={"samples": z}, tile_size=64, overlap=16, temporal_size=8)
    assert torch.equal(image, expected)  # the clip is streamed, so there are no tiles in time
    options = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    clip = sample_clip(9, 96, 96)
    (latent,) = run("VAEEncodeTiled", vae=vae, pixels=clip, **options)
    with torch.no_grad():
        expected = served.encode_tiled(clip.movedim(-1, 0)[None] * 2 - 1, 64, 64, 16)
    assert torch.equal(latent["samples"], expected)


def test_two_adapters_share_one_kvae(load, base, run):
    folder = base / "models" / "latent_adapters"
    direction = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")
    torch.manual_seed(2)
    save_adapter(folder / "other.safetensors", LatentAdapter(Affine(16, 16), *direction))
    try:
        one, two = (load(decode_adapter=f"{name}.safetensors") for name in ("h2k", "other"))
    finally:
        (folder / "other.safetensors").unlink()
    assert two.first_stage_model.kvae is one.first_stage_model.kvae
    assert two.patcher is one.patcher
    images = [run("VAEDecode", vae=vae, samples={"samples": Z})[0] for vae in (one, two, one)]
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert load(dtype="bf16").first_stage_model.kvae is not one.first_stage_model.kvae


def test_a_budget_holds_for_stock_decode_and_for_ours(run, load):
    from_loader, vae = load(memory_gb=0.001), load()
    with pytest.raises(ValueError, match="this clip needs at least .*, but the budget is 0.00 GB"):
        run("VAEDecode", vae=from_loader, samples={"samples": Z})
    with pytest.raises(ValueError, match="this clip needs at least .*, but the budget is 0.00 GB"):
        run("KVAEDecode", vae=vae, samples={"samples": Z}, scaling="raw", memory_gb=0.001)
    (image,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    (same,) = run("KVAEDecode", vae=from_loader, samples={"samples": Z}, scaling="raw", memory_gb=4.0)
    assert torch.equal(image, same)


@pytest.mark.parametrize("node", ["HunyuanImageToVideo", "Kandinsky5ImageToVideo"])
def test_image_to_video_conditioning_is_vae_encode(run, load, comfy, node):
    if node not in comfy.classes:
        pytest.skip(f"needs a ComfyUI with {node}")
    vae, image = load(), sample_clip(1, 32, 48)
    (expected,) = run("VAEEncode", vae=vae, pixels=image)
    inputs = {"positive": [[torch.zeros(1, 1), {}]], "vae": vae, "start_image": image}
    inputs |= {"width": 48, "height": 32, "length": 9, "batch_size": 1}
    if node == "HunyuanImageToVideo":
        conditioned, *_ = run(node, **inputs, guidance_type="v1 (concat)")
        found = conditioned[0][1]["concat_latent_image"]
    else:
        *_, start = run(node, **inputs, negative=inputs["positive"])
        found = start["samples"]
    assert torch.equal(found, expected["samples"])


def test_cancel_stops_after_the_current_segment(comfy, run, load, monkeypatch):
    vae, seen = load(), []

    def one_then_cancel(done, total):
        seen.append((done, total))
        if done:
            comfy.management.interrupt_current_processing()
        report(done, total)

    report, vae.first_stage_model.on_progress = vae.first_stage_model.on_progress, one_then_cancel
    with pytest.raises(comfy.management.InterruptProcessingException):
        run("VAEDecode", vae=vae, samples={"samples": Z})
    assert seen == [(0, 7), (5, 7)]


def test_out_of_memory_falls_back_to_tiles(run, load, monkeypatch):
    vae = load()
    decode = vae.first_stage_model.decode

    def small_card(z, **options):
        if z.shape[-1] > 32:
            raise torch.cuda.OutOfMemoryError
        return decode(z, **options)

    monkeypatch.setattr(vae.first_stage_model, "decode", small_card)
    (image,) = run("VAEDecode", vae=vae, samples={"samples": torch.randn(1, 16, 1, 8, 40)})
    assert image.shape == (1, 64, 320, 3)
    assert image.isfinite().all()


def test_memory_estimates_grow_with_the_picture_and_not_with_the_length(load):
    vae = load()
    decode, encode = vae.memory_used_decode, vae.memory_used_encode
    assert decode((1, 16, 31, 60, 90), torch.bfloat16) == decode((1, 16, 61, 60, 90), torch.bfloat16)
    assert decode((1, 16, 31, 90, 160), torch.float32) > 4 * decode((1, 16, 31, 60, 90), torch.bfloat16)
    pixels = 3 * 480 * 720  # only the frames themselves add up
    more = encode((1, 3, 241, 480, 720), torch.bfloat16) - encode((1, 3, 121, 480, 720), torch.bfloat16)
    assert more == pytest.approx(120 * pixels * (4 + 2))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_vae_loads_again(run, load, comfy, base, tiny_kvae, dtype):
    """Its config too, which ComfyUI's Save VAE does not write: the norms of the tiny KVAE have 8 groups, not 32."""
    import comfy_extras.nodes_model_merging as merging

    first = load(dtype=dtype)
    node = merging.VAESave()
    node.output_dir = str(base / "models" / "kvae")
    node.save(first, "saved")
    (file,) = (base / "models" / "kvae").glob("saved_*")
    try:
        again = load(kvae_name=file.name, dtype=dtype)
        assert again.first_stage_model.kvae.config.to_dict() == tiny_kvae.config.to_dict()
        (expected,), (image,) = (run("VAEDecode", vae=vae, samples={"samples": Z}) for vae in (first, again))
        for key, tensor in first.first_stage_model.kvae.state_dict().items():
            assert torch.equal(tensor, again.first_stage_model.kvae.state_dict()[key])
        # a file's tensors are aligned differently in memory, where the rounding of some CPU kernels depends on it
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5 if dtype == "fp32" else 0.02)
        embedded = load_adapter(TINY_ADAPTERS["h2k"])
        assert embedded.fits("kvae_3d_1.0", signature(again.first_stage_model.kvae.state_dict()))
    finally:
        file.unlink()


def test_an_adapter_for_other_weights_is_refused_and_not_found(load, base):
    folder = base / "models" / "latent_adapters"
    other = folder / "for_another.safetensors"
    weights = {"kvae_3d_1.0": VAEWeights("", tuple(0.1 * i for i in range(64)))}
    direction = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")
    save_adapter(other, LatentAdapter(Affine(16, 16), *direction, weights=weights))
    try:
        assert load().first_stage_model.vae.decode_adapter.metrics == {
            "psnr": 12.5
        }  # auto chooses the adapter that fits
        with pytest.raises(ValueError, match="whose signature begins 0, 0.1, 0.2; this is this project's tiny KVAE"):
            load(decode_adapter=other.name)
        aside = [path.rename(path.with_suffix(".aside")) for path in folder.glob("?2?.safetensors")]
        with pytest.raises(ValueError, match=f"{other.name} was made for a KVAE with other weights"):
            load()
    finally:
        for path in folder.glob("*.aside"):
            path.rename(path.with_suffix(".safetensors"))
        other.unlink()
    assert len(aside) == 2


def test_bfloat16_is_close(run, load):
    (half,) = run("VAEDecode", vae=load(dtype="bf16"), samples={"samples": Z})
    (full,) = run("VAEDecode", vae=load(), samples={"samples": Z})
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 4, 8, 8), "an image latent"),
        (torch.zeros(1, 32, 3, 4, 4), "hunyuan_video_1.5.*has its own VAE"),
        (torch.zeros(1, 16, 0, 4, 4), "empty"),
        (torch.full((1, 16, 2, 4, 4), float("nan")), "512 of 512 values of this latent are NaN"),
    ],
)
def test_wrong_latents_are_named(run, load, samples, message):
    vae = load()
    for node in ("VAEDecode", "KVAEDecode"):
        extra = {"scaling": "raw", "memory_gb": 0.0} if node == "KVAEDecode" else {}
        with pytest.raises(ValueError, match=message):
            run(node, vae=vae, samples={"samples": samples}, **extra)


def test_the_included_kvae_uses_the_included_adapters(run, load):
    vae = load(kvae_name="tiny KVAE (included)")
    clip = sample_clip(9, 64, 96)
    (latent,) = run("KVAEEncode", pixels=clip, vae=vae)
    (report,) = run("KVAEInspectLatent", samples=latent)
    assert "a latent of hunyuan_video" in report
    (frames,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    native = load(kvae_name="tiny KVAE (included)", latents="KVAE (native)")
    (alone,) = run("VAEDecode", vae=native, samples=run("VAEEncode", vae=native, pixels=clip)[0])
    assert (frames - clip).square().mean() < 1.2 * (alone - clip).square().mean()


def test_wrong_files_are_named(run, load, base, comfy):
    with pytest.raises(ValueError, match="a HunyuanVideo VAE; expected a KVAE"):
        load(kvae_name="hunyuan.safetensors")
    with pytest.raises(ValueError, match="swapped"):
        load(decode_adapter="k2h.safetensors")
    with pytest.raises(ValueError, match="Both adapters are none: choose one of them"):
        load(decode_adapter="none", encode_adapter="none")
    with pytest.raises(ValueError, match="cannot encode: no kvae_3d_1.0 → hunyuan_video adapter"):
        run("VAEEncode", vae=load(encode_adapter="none"), pixels=sample_clip(1, 32, 32))
    with pytest.raises(ValueError, match="adapter_hunyuan_to_kvae3d.safetensors is not in models/latent_adapters. Dow"):
        load(decode_adapter="adapter_hunyuan_to_kvae3d.safetensors")
    assert comfy.classes["KVAELoad"].validate_inputs("KVAE.safetensors") is True


def test_a_second_adapter_of_one_direction_must_be_chosen(load, base):
    folder = base / "models" / "latent_adapters"
    (folder / "other.safetensors").write_bytes((folder / "h2k.safetensors").read_bytes())
    try:
        with pytest.raises(ValueError, match="2 adapters map hunyuan_video → kvae_3d_1.0"):
            load()
        load(decode_adapter="other.safetensors")
    finally:
        (folder / "other.safetensors").unlink()
