"""The plan of a training's memory: against what PyTorch's allocator and autograd hold in a real, small run."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import needs
from kvae_comfyui.adapters import HybridVAE, LatentAdapter, latent_space
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.adapters.spaces import grid_ratios, native_space
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.appearance import appearance_loss, moved
from kvae_comfyui.training.vfl.conditions import Conditions, flow
from kvae_comfyui.training.vfl.count import Count
from kvae_comfyui.training.vfl.decoders import hunyuan_decoder, kvae_decoder, smaller
from kvae_comfyui.training.vfl.identity import Backbone, Embedder, Head, identity_loss
from kvae_comfyui.training.vfl.lora import add_lora, lora_parameters
from kvae_comfyui.training.vfl.path import Steps
from kvae_comfyui.training.vfl.plan import Sizes, passes, plan
from kvae_comfyui.training.vfl.plan_parts import count_look, count_network
from kvae_comfyui.training.vfl.tiny import tiny_dinov3, tiny_pipeline
from small_models import small

needs.package("transformers", "requirements-vfl.txt")
needs.package("peft", "requirements-vfl.txt")
GIB = 2**30
PUBLISHED = {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 54, "task_type": "i2v"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def allocated(run) -> int:
    """The most bytes that PyTorch's allocator gave out at once, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def saved(run) -> int:
    """The bytes of different tensors that autograd keeps."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def test_a_pass_takes_what_was_counted(pipe):
    """Clips of 29 frames in 128x128: 512 tokens, so that blocks are the most of it."""
    transformer = pipe.transformer
    counted = count_network(dict(transformer.config), 29, 128, 128, "fp32", "published", 4, 8)
    add_lora(transformer, "published", 4, 4)
    transformer.enable_gradient_checkpointing()
    lora = sum(each.nbytes for each in lora_parameters(transformer).values())
    base = sum(each.nbytes for each in transformer.parameters()) - lora
    assert (counted.lora, counted.rest + counted.blocks * counted.block) == (lora, base)
    texts = {"text": torch.randn(1, 8, 16), "text_mask": torch.ones(1, 8)}
    glyphs = {"glyphs": torch.randn(1, 1, 24), "glyph_mask": torch.zeros(1, 1)}
    given = Conditions(torch.randn(1, 32, 1, 8, 8), torch.randn(1, 729, 20), **texts, **glyphs)
    x = torch.randn(1, 32, 8, 8, 8)

    def forward():
        return flow(transformer, given, x, torch.tensor(0.5)).sum()

    forward().backward()  # the gradients are there from now on
    assert allocated(lambda: forward().backward()) == pytest.approx(counted.inputs + counted.peak, rel=0.05)


@pytest.mark.parametrize("name", ["hunyuan", "2.0-t4s16", "1.0"])
def test_the_identity_loss_takes_what_was_counted(pipe, name):
    dinov3 = tiny_dinov3()
    if name == "hunyuan":
        config, decode = dict(pipe.vae.config), hunyuan_decoder(tiny_pipeline().vae)
    else:
        kvae = small(name)
        ways = latent_space("hunyuan_video_1.5"), native_space(kvae.config)
        network = Affine(*(space.channels * n**2 for space, n in zip(ways, grid_ratios(*ways), strict=True)))
        adapter = LatentAdapter(network, *ways).requires_grad_(False)
        config, decode = kvae.config, kvae_decoder(HybridVAE(kvae, adapter))
    counted = count_look(config, dinov3.config.to_dict(), torch.float32, (3, 4, 6), 2, 0.5, 3)
    embedder, z = Embedder(Backbone(dinov3, "", ""), Head((32, 32))), torch.randn(1, 32, 3, 4, 6, requires_grad=True)
    anchor = torch.randn(1, 32)

    def loss():
        return identity_loss(embedder, decode(smaller(z, 2, 0.5)), [1, 2, 4], anchor)

    with Count() as real:  # the allocator also sees workspaces of convolutions, which dwarf clips as small as this
        torch.autograd.grad(loss(), z)
    assert counted.peak == pytest.approx(real.peak, rel=0.1) and counted.peak > saved(loss)
    assert counted.backbone == sum(each.nbytes for each in embedder.parameters())


def test_the_appearance_loss_takes_what_was_counted(pipe):
    """It holds where the subject of the picture should be, while the student's clip is decoded."""
    config, decode = dict(pipe.vae.config), hunyuan_decoder(tiny_pipeline().vae)
    counted = count_look(config, tiny_dinov3().config.to_dict(), torch.float32, (3, 4, 6), 2, 0.5, 0, appearance=True)
    z = torch.randn(1, 32, 3, 4, 6, requires_grad=True)
    with Count() as real:
        with torch.no_grad():
            y = decode(smaller(z, 2, 0.5))
            target = moved(y, y[:, :, 0], torch.ones_like(y[:, 0, 0]))
            del y
        y = decode(smaller(z, 2, 0.5))
        torch.autograd.grad(appearance_loss(y, target), z)
    assert counted.peak == pytest.approx(real.peak, rel=0.01)


def test_passes_are_those_of_the_law():
    """Without jitter and tail: indices 6 and 12, then 17."""
    law = Steps(jitter=0, tail=0)
    found = passes(law, 25, (17, 17))
    assert found.student == 3 and found.teacher == 18 + 1
    assert passes(law, 25, (17, 17), guided=True, samples=2).teacher == 2 * (2 * 18 + 1)
    assert passes(law, 25, (17, 17), every=0).student == 2


@pytest.fixture(scope="module")
def published(pipe):
    """The published network, without an identity loss, so that it is counted quickly."""
    config = dict(pipe.transformer.config) | PUBLISHED | {"rope_axes_dim": (16, 56, 56)}
    config |= {"text_embed_dim": 3584, "text_embed_2_dim": 1472, "image_embed_dim": 1152}
    return plan(config, Sizes(), work=passes(Steps(), 25, (14, 20), every=0))


def test_the_published_network_is_as_large_as_it_is(published):
    """8.33 B parameters, 53.4 M of LoRA at rank 16; in fp8 7.9 GiB."""
    base, lora = list(published.held.values())[:2]
    assert base / 2 == pytest.approx(8.33e9, rel=2e-3) and lora / 12 == pytest.approx(53.4e6, rel=2e-3)
    narrow = published.changed({"base_dtype": "fp8"})
    assert next(iter(narrow.held.values())) / GIB == pytest.approx(7.9, abs=0.05)
    away = published.changed({"offload": True})
    assert away.host + next(iter(away.held.values())) == pytest.approx(base + 2 * away.host / 54, abs=2)
    assert away.total_bytes < narrow.total_bytes < published.total_bytes
    assert published.changed({"processes": 8}).total_bytes < 0.5 * published.total_bytes


def test_what_does_not_fit_is_refused_with_what_to_lower(published):
    published.check(published.total_bytes)
    with pytest.raises(
        UserError, match=r"holds \d+\.\d GiB at once, 16\.0 are free; the base in bf16 takes 15\.5"
    ) as e:
        published.check(16 * GIB)
    assert "it fits with --base-dtype fp8 (7." in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"--base-dtype fp8 .*, --offload .*, --frames 9 .*: \d\.\d, at least"):
        published.check(GIB)
    with pytest.raises(UserError, match=r"takes \d\.\d; --frames 9 .*, at least"):  # such a base is shared in bf16 only
        published.changed({"processes": 8}).check(GIB)


def test_a_decode_that_does_not_fit_is_to_be_smaller(pipe):
    sizes = Sizes(1, 128, 128, "fp32", rank=2, decode_scale=1.0)
    found = plan(dict(pipe.transformer.config), sizes, dict(pipe.vae.config), tiny_dinov3().config.to_dict())
    assert found.decode > found.student and "the decoder" in found.table()
    with pytest.raises(UserError, match=r"it fits with --decode-scale 0.5 \(0.0 less\)$"):
        found.check(found.total_bytes - 1)


def test_the_table_adds_up(published):
    rows = [line.split(" GiB  ") for line in published.table().splitlines() if " GiB  " in line]
    sizes = {name: float(size) for size, name in rows}
    parts = [size for name, size in sizes.items() if not name.startswith(("at once", "a pass", "the identity"))]
    assert sizes["at once, at the most"] == pytest.approx(sum(parts) + published.student / GIB, abs=0.03)
    assert "not measured" in published.table() and "TFLOP a step (counted)" in published.table()
    assert not replace(published, operations=0.0).table().count("TFLOP")
