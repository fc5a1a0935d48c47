"""Nodes that give a copy of a VAE another patcher, and the patcher's model as first_stage_model, as core does.

Select VAE Device does so, for its choice "default" too. Older ComfyUI lacks it: there its steps are taken by hand.
"""

from copy import copy, deepcopy

import pytest
import torch

from kvae_comfyui.serving.sample_clip import sample_clip

from .conftest import with_hidden

Z = torch.randn(1, 16, 6, 12, 12, generator=torch.Generator().manual_seed(1))  # 21 frames: segments of 17 and 4
CLIP = sample_clip(9, 96, 96)
TILED = {"tile_size": 64, "overlap": 16, "temporal_size": 8}
DECODE = {"samples": {"samples": Z}, "scaling": "raw", "memory_gb": 0.0}
IMAGE = {"width": 48, "height": 32, "length": 9, "batch_size": 1, "start_image": CLIP[:1, :32, :48]}
POSITIVE = [[torch.zeros(1, 1), {}]]

CASES = {
    "VAEDecode": {"samples": {"samples": Z}},
    "VAEEncode": {"pixels": CLIP},
    "VAEDecodeTiled": {"samples": {"samples": Z}, **TILED},
    "VAEEncodeTiled": {"pixels": CLIP, **TILED, "temporal_overlap": 4},
    "KVAEDecode": DECODE,
    "KVAEEncode": {"pixels": CLIP},
    "KVAECompare": {"pixels": CLIP},
    "HunyuanImageToVideo": {"positive": POSITIVE, "guidance_type": "v1 (concat)", **IMAGE},
    "Kandinsky5ImageToVideo": {"positive": POSITIVE, "negative": POSITIVE, **IMAGE},
}


@pytest.fixture
def selected(comfy, run):
    """What Select VAE Device returns for a VAE, on the device that it has already."""

    def selected(vae):
        if "SelectVAEDevice" in comfy.classes:
            return run("SelectVAEDevice", vae=vae, device="default")[0]
        return moved(vae, vae.patcher.clone())

    return selected


def moved(vae, patcher):
    """The steps of Select VAE Device, with this patcher."""
    vae = copy(vae)
    vae.patcher = patcher
    vae.first_stage_model = vae.patcher.model
    vae.device = patcher.load_device
    return vae


def tensors(value) -> list[torch.Tensor]:
    """All tensors in what a node returns."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in tensors(each)]


@pytest.mark.parametrize("node", CASES)
def test_a_node_computes_the_same_after_select_vae_device(comfy, run, load, selected, node):
    if node not in comfy.classes:
        pytest.skip(f"needs a ComfyUI with {node}")
    vae = load()
    results = []
    for each in (vae, selected(vae), vae):
        vaes = {"vae_a": each, "vae_b": each} if node == "KVAECompare" else {"vae": each}
        results.append(tensors(run(node, **vaes, **CASES[node])))
    expected, found, again = results
    assert expected
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert all(torch.equal(*pair) for pair in zip(expected, again, strict=True))  # the first VAE is left as it was


def test_a_video_is_the_same_after_select_vae_device(comfy, load, selected, base):
    node, vae = with_hidden(comfy.classes["KVAEDecodeToVideo"]), load()
    for each, name in ((vae, "plain"), (selected(vae), "selected")):
        settings = {"fps": 24.0, "codec": "h264", "crf": 18, "filename_prefix": f"replaced/{name}"}
        with torch.inference_mode():
            node.execute(vae=each, **DECODE, **settings)
    folder = base / "output" / "replaced"
    assert (folder / "plain_00001_.mp4").read_bytes() == (folder / "selected_00001_.mp4").read_bytes()


def test_a_selected_vae_is_saved_as_a_kvae(load, selected):
    vae = load()
    assert selected(vae).get_sd().keys() == vae.get_sd().keys()


@pytest.fixture
def elsewhere(load):
    """(a VAE, a copy with another patcher and KVAE for another device). A CPU is one device, but has two names."""
    vae = load(memory_gb=1.0)
    patcher = type(vae.patcher)(deepcopy(vae.patcher.model), torch.device("cpu", 0), torch.device("cpu"))
    return vae, moved(vae, patcher)


def test_a_vae_on_another_device_keeps_its_adapters_and_settings(run, elsewhere):
    here, there = elsewhere
    assert there.first_stage_model.kvae is there.patcher.model is not here.first_stage_model.kvae
    assert there.first_stage_model.planner.kvae is there.patcher.model
    assert there.first_stage_model.planner.budget == here.first_stage_model.planner.budget == 1_000_000_000
    assert there.first_stage_model.vae.decode_adapter is here.first_stage_model.vae.decode_adapter
    images = [run("VAEDecode", vae=vae, samples={"samples": Z})[0] for vae in (here, there)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)  # the same weights at other addresses


def test_a_vae_on_another_device_asks_that_one_for_memory(comfy, elsewhere, monkeypatch):
    here, there = elsewhere
    for vae in (here, there):
        asked = []
        monkeypatch.setattr(comfy.management, "get_free_memory", lambda device, asked=asked: asked.append(device) or 1)
        vae.first_stage_model.planner.free_memory()
        assert asked == [vae.patcher.load_device] == [vae.first_stage_model.planner.device]
    assert here.patcher.load_device != there.patcher.load_device


def test_a_selected_vae_is_not_unloaded_to_make_room_for_itself(comfy, load, run, selected, monkeypatch):
    vae = selected(load())
    kvae, loaded = vae.first_stage_model.kvae, []
    decode_stream = kvae.decode_stream

    def small_card(*args, **options):
        loaded.append(vae.patcher in comfy.management.loaded_models())
        if len(loaded) == 1:
            raise torch.OutOfMemoryError("small card")
        yield from decode_stream(*args, **options)

    monkeypatch.setattr(kvae, "decode_stream", small_card)
    run("VAEDecode", vae=vae, samples={"samples": Z})
    assert loaded == [True, True]


def test_select_vae_device_reads_the_kvae_again_for_another_card(comfy, load, run):
    vae = load()
    if not hasattr(vae.patcher, "deepclone_multigpu"):
        pytest.skip("needs a ComfyUI with deep clones for other cards")
    other = moved(vae, vae.patcher.deepclone_multigpu(new_load_device=torch.device("cpu", 0)))
    assert other.first_stage_model.kvae is not vae.first_stage_model.kvae
    images = [run("VAEDecode", vae=each, samples={"samples": Z})[0] for each in (vae, other)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_another_model_is_refused(load):
    with pytest.raises(TypeError, match="A node puts a Linear in place of KVAE"):
        load().first_stage_model = torch.nn.Linear(1, 1)
