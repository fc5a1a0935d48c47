"""LoRA files beside musubi-tuner's own code: its network, its merging, and its converter for ComfyUI.

MUSUBI_PATH=/path/to/musubi-tuner python -m pytest tests/training/vfl/test_lora_as_musubi.py
"""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from kvae_comfyui.training.vfl.lora import TARGETS
from kvae_comfyui.training.vfl.lora_files import lora_state, write_lora
from kvae_comfyui.training.vfl.lora_names import in_tencent
from kvae_comfyui.training.vfl.lora_pairs import Pair
from kvae_comfyui.training.vfl.lora_reading import read_lora

pytestmark = needs.musubi


def layers() -> dict[str, torch.nn.Linear]:
    """The layers of diffusers' real network that a LoRA may change, without values."""
    diffusers = needs.package("diffusers", "requirements-vfl.txt")
    with torch.device("meta"):
        network = diffusers.HunyuanVideo15Transformer3DModel()
    return {name: each for name, each in network.named_modules() if re.fullmatch(TARGETS["all"], name)}


@pytest.fixture(scope="module")
def lora():
    """Of one block, the text refiner and the end, 8 wide."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name in layers() if not re.match(r"transformer_blocks\.[^0]", name)]
    shapes = ((4, 8), (16, 4))
    return {name: Pair(*(torch.randn(shape, generator=generator) for shape in shapes), 6.0) for name in names}


def test_its_network_has_all_layers_in_the_same_shape(monkeypatch):
    models = needs.musubi_module(monkeypatch, "hunyuan_video_1_5.hunyuan_video_1_5_models")
    with torch.device("meta"):
        theirs = dict(models.HunyuanVideo_1_5_DiffusionTransformer("i2v").named_modules())
    for name, layer in layers().items():
        assert theirs[in_tencent(name).name].weight.shape == layer.weight.shape, name


def test_it_merges_our_file_whole(lora, monkeypatch, tmp_path, caplog):
    utils = needs.musubi_module(monkeypatch, "utils.lora_utils")
    there = {name: in_tencent(name) for name in lora}
    save_file({f"{each.name}.weight": torch.zeros(16, 8) for each in there.values()}, tmp_path / "base.safetensors")
    (path,) = write_lora(tmp_path, "a", lora, ["musubi"])
    cpu = torch.device("cpu")
    merged = utils.load_safetensors_with_lora_and_fp8(
        str(tmp_path / "base.safetensors"), [load_file(path)], [1.0], fp8_optimization=False, calc_device=cpu
    )
    assert "not all LoRA keys are used" not in caplog.text
    for name, pair in lora.items():
        expected = pair.scale * pair.b @ pair.a
        expected = torch.cat(expected.chunk(2)[::-1]) if name == "norm_out.linear" else expected
        torch.testing.assert_close(merged[f"{there[name].name}.weight"], expected, msg=name)


def test_its_converter_makes_our_file_for_comfyui(lora, monkeypatch, tmp_path):
    converter = needs.musubi_module(monkeypatch, "networks.convert_hunyuan_video_1_5_lora_to_comfy")
    (path,) = write_lora(tmp_path, "a", lora, ["musubi"])
    converted = tmp_path / "converted.safetensors"
    converter.main(SimpleNamespace(src_path=str(path), dst_path=str(converted), reverse=False))
    ours, theirs = lora_state(lora, "comfyui"), load_file(converted)
    spelling = {"lora_A": "lora_down", "lora_B": "lora_up"}
    for key, tensor in ours.items():
        layer, kind, *rest = re.fullmatch(r"diffusion_model\.(.*)\.(lora_A|lora_B|alpha)(\.weight)?", key).groups()
        name = f"lora_unet_{layer.replace('.', '_')}.{spelling.get(kind, kind)}{rest[0] or ''}"
        assert torch.equal(theirs.pop(name), tensor), key
    assert not theirs
    found = read_lora(converted).layers
    assert found.keys() == lora.keys()
    assert all(torch.equal(found[name].a, lora[name].a) and torch.equal(found[name].b, lora[name].b) for name in lora)
