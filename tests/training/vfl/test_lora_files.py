"""LoRA files for four programs: written, read, and run in a fresh network by diffusers itself."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import needs
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.vfl.lora import TARGETS, add_lora, lora_of, lora_parameters, put_lora
from kvae_comfyui.training.vfl.lora_files import FORMATS, lora_path, lora_state, peft_config, write_lora
from kvae_comfyui.training.vfl.lora_names import in_comfyui, in_diffusers, in_tencent
from kvae_comfyui.training.vfl.lora_pairs import Pair
from kvae_comfyui.training.vfl.lora_reading import read_lora
from tiny_flow import SHAPE, conditions, flow, tiny_network

needs.package("peft", "requirements-vfl.txt")
X = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(1))


def made_lora(alpha: float, targets: str = "all"):
    """A LoRA of rank 4 for the tiny network, random everywhere."""
    network = tiny_network()
    add_lora(network, targets, rank=4, alpha=alpha)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_parameters(network).values():
            parameter.normal_(std=0.3, generator=generator)
    return lora_of(network)


@pytest.fixture(scope="module")
def lora():
    return made_lora(alpha=4)


def run(network):
    with torch.no_grad():
        return flow(network, conditions(1), X, torch.tensor(0.8))


def effect(lora):
    network = tiny_network()
    put_lora(network, lora)
    return run(network)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].a, b[name].a) and torch.equal(a[name].b, b[name].b) and a[name].alpha == b[name].alpha
        for name in a
    )


def test_every_layer_has_one_name_everywhere():
    names = [name for name, each in tiny_network().named_modules() if re.fullmatch(TARGETS["all"], name)]
    assert len({in_tencent(name).name for name in names}) == len(names)
    for name in names:
        here, there = in_tencent(name), in_comfyui(name)
        assert in_diffusers(here.name) == in_diffusers(here.name.replace(".", "_")) == ([name], here.swapped)
        found, swapped = in_diffusers(there.name)
        assert found[there.part or 0] == name and swapped == there.swapped == (name == "norm_out.linear")
        assert len(found) == (1 if there.part is None else 3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_gives_back_what_was_written(lora, format, tmp_path):
    (path,) = write_lora(tmp_path, "a", lora, [format])
    found = read_lora(path)
    assert found.format == format and same(found.layers, lora)
    assert found.about() == f"format {format}, {len(lora)} layers, rank 4, alpha 4"


def test_all_formats_one_after_another_give_back_what_was_written(lora, tmp_path):
    found = lora
    for i, format in enumerate(["musubi", "comfyui", "diffusers", "comfyui", "musubi", "peft"]):
        (path,) = write_lora(tmp_path / str(i), "a", found, [format])
        found = read_lora(path.parent if format == "peft" else path).layers
    assert same(found, lora)


@pytest.mark.parametrize("alpha", [4, 6, 0.1])
@pytest.mark.parametrize("format", FORMATS)
def test_the_effect_does_not_depend_on_the_format(format, alpha, tmp_path):
    lora = made_lora(alpha)
    (path,) = write_lora(tmp_path, "a", lora, [format])
    before, after = effect(lora), effect(read_lora(path).layers)
    torch.testing.assert_close(after, before, rtol=0, atol=0 if alpha == 4 else 2e-6)
    assert not torch.allclose(before, run(tiny_network()), atol=1e-3)


@pytest.mark.parametrize("alpha", [4, 2])
def test_diffusers_reads_our_files(alpha, tmp_path):
    lora = made_lora(alpha)
    peft, diffusers = write_lora(tmp_path, "a", lora, ["peft", "diffusers"])
    expected = effect(lora)
    network = tiny_network()
    network.load_lora_adapter(peft.parent, prefix=None, weight_name=peft.name, use_safetensors=True)
    assert torch.equal(run(network), expected)
    network = tiny_network()
    network.load_lora_adapter(diffusers)
    assert torch.equal(run(network), expected)


def test_a_wrong_prefix_or_alpha_would_be_seen(tmp_path):
    """The comparisons above fail for a file that diffusers ignores, and for one with another alpha."""
    lora = made_lora(alpha=2)
    expected = effect(lora)
    (peft,) = write_lora(tmp_path, "a", lora, ["peft"])
    network = tiny_network()
    network.load_lora_adapter(peft.parent, weight_name=peft.name)  # it looks for keys with "transformer."
    assert torch.equal(run(network), run(tiny_network()))
    state = load_file(peft)
    network = tiny_network()
    network.load_lora_adapter(state, prefix=None)  # without metadata, alpha is taken for r
    assert not torch.allclose(run(network), expected, atol=1e-3)


def test_our_folder_is_that_of_diffusers(lora, tmp_path):
    network = tiny_network()
    put_lora(network, lora)
    network.save_lora_adapter(tmp_path / "theirs")
    write_lora(tmp_path, "ours", lora, ["peft"])
    theirs, ours = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("theirs", "ours.peft"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert same(read_lora(tmp_path / "theirs").layers, lora)


def test_a_folder_of_several_alphas_that_diffusers_wrote(tmp_path):
    lora = {"norm_out.linear": Pair(torch.randn(2, 32), torch.randn(64, 2), 5.0)}
    lora |= {f"transformer_blocks.{i}.attn.to_q": Pair(torch.randn(3, 32), torch.randn(32, 3), 1.5) for i in range(3)}
    network = tiny_network()
    put_lora(network, lora)
    network.save_lora_adapter(tmp_path)
    found = read_lora(tmp_path)
    assert same(found.layers, lora) and found.about() == "format peft, 4 layers, rank 2 to 3, alpha 1.5 to 5"
    assert torch.equal(effect(found.layers), run(network))


def test_the_targets_in_the_metadata_are_the_layers(lora):
    config = json.loads(json.dumps(peft_config(lora)))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    names = {name for name, _ in tiny_network().named_modules() if re.fullmatch(config["target_modules"], name)}
    assert names == lora.keys()


def test_comfyui_has_one_layer_for_q_k_and_v():
    lora = made_lora(alpha=6, targets="attention")
    state = lora_state(lora, "comfyui")
    key = "diffusion_model.double_blocks.1.txt_attn.qkv"
    a, b, alpha = (state[f"{key}.{end}"] for end in ("lora_A.weight", "lora_B.weight", "alpha"))
    assert a.shape == (12, 32) and b.shape == (96, 12) and alpha == 18
    parts = [lora[f"transformer_blocks.1.attn.add_{name}_proj"] for name in "qkv"]
    torch.testing.assert_close(alpha / 12 * b @ a, torch.cat([p.alpha / 4 * p.b @ p.a for p in parts]))


def test_a_dense_qkv_of_comfyui_is_split_exactly(tmp_path):
    """A LoRA trained on the fused layer: its B is not made of blocks."""
    a, b = torch.randn(6, 32), torch.randn(96, 6)
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    state = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors").layers
    parts = [found[f"transformer_blocks.0.attn.to_{name}"] for name in "qkv"]
    torch.testing.assert_close(torch.cat([p.scale * p.b @ p.a for p in parts]), 0.5 * b @ a)


def test_one_of_q_k_and_v_alone_reaches_comfyui():
    pair = Pair(torch.randn(2, 32), torch.randn(32, 2), 3.0)
    state = lora_state({"transformer_blocks.0.attn.to_v": pair}, "comfyui")
    a, b, alpha = state.values()
    torch.testing.assert_close(alpha / len(a) * b @ a, torch.cat([torch.zeros(64, 32), 1.5 * pair.b @ pair.a]))


def test_a_file_without_alpha_has_a_scale_of_one(lora, tmp_path):
    state = {key: value for key, value in lora_state(lora, "comfyui").items() if not key.endswith("alpha")}
    save_file(state, tmp_path / "a.safetensors")
    assert same(read_lora(tmp_path / "a.safetensors").layers, lora)


A, B = "transformer.norm_out.linear.lora_A.weight", "transformer.norm_out.linear.lora_B.weight"
GOOD = {A: torch.ones(2, 32), B: torch.ones(64, 2)}
BAD = [
    ({}, {}, "this is not a file this project knows; expected a LoRA of peft, diffusers, musubi-tuner or ComfyUI"),
    ({"double_blocks.0.weight": torch.ones(1)}, {}, "this is a diffusion model; expected a LoRA"),
    ({A: GOOD[A]}, {}, "norm_out.linear lacks A or B"),
    (GOOD | {B: torch.ones(64, 3)}, {}, "[2, 32] and .*[64, 3]; expected [r, in] and [out, r]"),
    ({A: torch.ones(0, 32), B: torch.ones(64, 0)}, {}, "expected [r, in] and [out, r]"),
    (GOOD | {A: torch.full((2, 32), torch.nan)}, {}, "lora_A.weight holds values that are not finite numbers"),
    (GOOD | {A: torch.ones(2, 32, dtype=torch.int8)}, {}, "lora_A.weight holds values that are not finite numbers"),
    (GOOD | {"transformer.norm_out.linear.alpha": torch.zeros(())}, {}, "expected one number other than 0"),
    (GOOD | {"transformer.norm_out.linear.dora_scale": torch.ones(2)}, {}, "dora_scale is not part of a plain LoRA"),
    ({key.replace("norm_out", "norm_in"): value for key, value in GOOD.items()}, {}, "norm_in.linear is no layer"),
    (GOOD, {"r": 2, "lora_alpha": 2, "use_rslora": True}, "made with use_rslora; expected a plain LoRA"),
    (GOOD, {"lora_alpha": "2"}, "an alpha in its metadata is 2; expected a number other than 0"),
    (GOOD, {"alpha_pattern": {"norm": 2}}, "the alpha_pattern norm in its metadata fits none of its layers"),
    (GOOD, {"alpha_pattern": [2]}, "its lora_adapter_metadata is not a config of peft"),
    (GOOD, "[" * 100_000, "its lora_adapter_metadata is not a config of peft"),
]


@pytest.mark.parametrize("state, config, words", BAD, ids=[words[:40] for *_, words in BAD])
def test_bad_files_are_refused(state, config, words, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": text} if config else None)
    pattern = ".*".join(map(re.escape, words.split(".*")))
    with pytest.raises(WeightsError, match=f"a.safetensors: .*{pattern}"):
        read_lora(tmp_path / "a.safetensors")


def test_a_folder_without_a_lora_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="pytorch_lora_weights.safetensors: no such file"):
        read_lora(tmp_path)
    assert lora_path(tmp_path, "a", "peft").parent.name == "a.peft"
