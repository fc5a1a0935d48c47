"""KVAE beside other models: it plans within what ComfyUI says is free, and unloads the others if that was not enough.

The tests run on a CPU; ComfyUI's own functions are told what a card would say.
"""

import pytest
import torch

from kvae_comfyui.serving.measured import WORKSPACE

Z = torch.randn(1, 16, 6, 12, 12, generator=torch.Generator().manual_seed(1))  # 21 frames: segments of 17 and 4


@pytest.fixture
def vae(load):
    return load(latents="KVAE (native)")


@pytest.fixture
def planned(vae, monkeypatch):
    """The ladders of all decodes."""
    ladders, planner = [], vae.first_stage_model.planner
    ladder = planner.ladder

    def spy(*args, **options):
        ladders.append(ladder(*args, **options))
        return ladders[-1]

    monkeypatch.setattr(planner, "ladder", spy)
    return ladders


def card(comfy, monkeypatch, free, reserved=0):
    """Make ComfyUI say that this many bytes are free, and that others need some of them. Returns what was asked for."""
    asked = []
    monkeypatch.setattr(comfy.management, "get_free_memory", lambda *args, **options: asked.append(args) or free)
    monkeypatch.setattr(comfy.management, "extra_reserved_memory", lambda: reserved)
    return asked


def test_a_plan_fits_what_is_free_without_what_is_reserved(comfy, run, vae, planned, monkeypatch):
    fastest = vae.memory_used_decode(Z.shape, torch.float32)
    (whole,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    need = int(fastest) + 1
    for free, reserved in ((need, 0), (need + 5000, 5000), (need + 5000, 10_000)):
        card(comfy, monkeypatch, free, reserved)
        (image,) = run("VAEDecode", vae=vae, samples={"samples": Z})
        torch.testing.assert_close(image, whole, rtol=0, atol=1e-4)
    assert [WORKSPACE * ladder.plan.peak == fastest for ladder in planned] == [True, True, True, False]
    assert WORKSPACE * planned[-1].plan.peak <= need - 5000


def test_free_memory_is_asked_for_once_for_all_clips(comfy, run, vae, monkeypatch):
    asked = []
    monkeypatch.setattr(vae.first_stage_model.planner, "free_memory", lambda: asked.append(None))
    run("VAEDecode", vae=vae, samples={"samples": torch.cat([Z, Z, Z])})
    assert len(asked) == 1


def test_comfyui_is_asked_for_what_the_plan_takes(comfy, run, vae, planned, monkeypatch):
    required, load_models = [], comfy.management.load_models_gpu

    def spy(models, memory_required=0, **options):
        required.append(memory_required)
        return load_models(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.management, "load_models_gpu", spy)
    run("VAEDecode", vae=vae, samples={"samples": Z})
    run("KVAEDecode", vae=vae, samples={"samples": Z}, scaling="raw", memory_gb=0.0)
    assert required == [WORKSPACE * planned[0].plan.peak] * 2


def test_what_a_first_decode_left_in_the_cache_is_free_for_the_second(comfy, monkeypatch):
    stats = {"active_bytes.all.current": 2, "reserved_bytes.all.current": 10}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    assert comfy.management.get_free_memory(torch.device("cuda")) == 108


def test_other_models_are_unloaded_before_a_smaller_plan_is_tried(comfy, run, vae, monkeypatch, caplog):
    (whole,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    patcher_class = type(vae.patcher)
    other = patcher_class(torch.nn.Linear(8, 8), load_device=vae.device, offload_device=torch.device("cpu"))
    comfy.management.load_models_gpu([other])
    loaded, kvae = [], vae.first_stage_model.kvae
    decode_stream = kvae.decode_stream

    def small_card(*args, **options):
        loaded.append(comfy.management.loaded_models())
        for i, frames in enumerate(decode_stream(*args, **options)):
            if i and len(loaded) == 1:
                raise torch.OutOfMemoryError("small card")
            yield frames

    monkeypatch.setattr(kvae, "decode_stream", small_card)
    (image,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    torch.testing.assert_close(image, whole, rtol=0, atol=1e-4)
    assert [other in models for models in loaded] == [True, False]
    assert all(vae.patcher in models for models in loaded)
    (record,) = caplog.records
    assert record.getMessage().startswith("Out of memory; trying again with")


@pytest.mark.parametrize("state", ["NO_VRAM", "LOW_VRAM", "NORMAL_VRAM", "HIGH_VRAM"])
def test_every_vram_state_decodes_alike(comfy, run, load, state, monkeypatch):
    """ComfyUI's loader takes the way that it takes for a card."""
    vae = load(latents="KVAE (native)")
    (whole,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    monkeypatch.setattr(comfy.management, "vram_state", comfy.management.VRAMState[state])
    monkeypatch.setattr(comfy.management, "is_device_cpu", lambda device: False)
    comfy.management.unload_all_models()
    (image,) = run("VAEDecode", vae=vae, samples={"samples": Z})
    assert torch.equal(image, whole)
