"""A LoRA in ComfyUI's own network of HunyuanVideo 1.5: the effect that it has in that of diffusers."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import needs
from kvae_comfyui.training.vfl.lora_files import write_lora
from kvae_comfyui.training.vfl.lora_names import in_comfyui
from kvae_comfyui.training.vfl.lora_pairs import Pair

WIDTH, CHANNELS = 32, 65
TEXT, GLYPHS, PICTURE = 16, 1472, 20  # widths; ComfyUI takes no others for glyphs
RENAMED = [  # what no LoRA changes, diffusers → ComfyUI
    (r"x_embedder\.", "img_in."),
    (r"time_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"cond_type_embed\.", "cond_type_embedding."),
    (r"image_embedder\.norm_in", "vision_in.proj.0"),
    (r"image_embedder\.linear_1", "vision_in.proj.1"),
    (r"image_embedder\.linear_2", "vision_in.proj.3"),
    (r"image_embedder\.norm_out", "vision_in.proj.4"),
    (r"context_embedder_2\.norm", "byt5_in.layernorm"),
    (r"context_embedder_2\.linear_(\d)", r"byt5_in.fc\1"),
    (r"context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.in_layer"),
    (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.out_layer"),
    (r"context_embedder\.time_text_embed\.text_embedder\.linear_1", "txt_in.c_embedder.in_layer"),
    (r"context_embedder\.time_text_embed\.text_embedder\.linear_2", "txt_in.c_embedder.out_layer"),
    (r"context_embedder\.token_refiner\.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    (r"attn\.to_out\.0", "self_attn.proj"),
    (r"ff\.net\.0\.proj", "mlp.0"),
    (r"ff\.net\.2", "mlp.2"),
    (r"transformer_blocks", "double_blocks"),
    (r"attn\.norm_(q|k)\.", lambda m: f"img_attn.norm.{'query' if m[1] == 'q' else 'key'}_norm."),
    (r"attn\.norm_added_(q|k)\.", lambda m: f"txt_attn.norm.{'query' if m[1] == 'q' else 'key'}_norm."),
    (r"proj_out\.", "final_layer.linear."),
]


def theirs_of(network) -> dict[str, torch.Tensor]:
    """The weights of diffusers' network as ComfyUI's: layers of LoRAs by the table, which so is tested as well."""
    state, parts = {}, {}
    for key, tensor in network.state_dict().items():
        layer, end = key.rsplit(".", 1)
        refiner = re.fullmatch(r"(context_embedder.*)\.attn\.to_([qkv])", layer)
        try:
            there = in_comfyui(layer)
        except KeyError:
            name = f"{refiner[1]}.self_attn.qkv.{end}" if refiner else key
            for pattern, new in RENAMED:
                name = re.sub(pattern, new, name)
            part = "qkv".index(refiner[2]) if refiner else None
        else:
            name, part = f"{there.name}.{end}", there.part
            tensor = torch.cat(tensor.chunk(2)[::-1]) if there.swapped else tensor
        if part is None:
            state[name] = tensor
        else:
            parts.setdefault(name, {})[part] = tensor
    return state | {name: torch.cat([found[i] for i in range(3)]) for name, found in parts.items()}


@pytest.fixture
def ours():
    diffusers = needs.package("diffusers", "requirements-vfl.txt")
    network = diffusers.HunyuanVideo15Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, num_refiner_layers=2, text_embed_dim=TEXT,
        text_embed_2_dim=GLYPHS, image_embed_dim=PICTURE, rope_axes_dim=(4, 6, 6), target_size=32,
    )  # fmt: skip
    for parameter in network.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return network.requires_grad_(False)


@pytest.fixture
def host(comfy, ours):
    """ComfyUI's model around its network, with the weights of ours."""
    import comfy.ldm.hunyuan_video.model as hunyuan
    import comfy.model_patcher
    import comfy.ops

    network = hunyuan.HunyuanVideo(
        in_channels=CHANNELS, out_channels=32, vec_in_dim=None, context_in_dim=TEXT, hidden_size=WIDTH, mlp_ratio=4.0,
        num_heads=2, depth=3, depth_single_blocks=0, axes_dim=[4, 6, 6], theta=256, patch_size=[1, 1, 1], qkv_bias=True,
        guidance_embed=False, byt5=True, meanflow=False, use_cond_type_embedding=True, vision_in_dim=PICTURE,
        meanflow_sum=False, dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    ).requires_grad_(False)  # fmt: skip
    older = "double_blocks.0.img_attn.norm.key_norm.scale" in network.state_dict()
    norm = "_norm.scale" if older else "_norm.weight"
    network.load_state_dict({key.replace("_norm.weight", norm): value for key, value in theirs_of(ours).items()})
    model = torch.nn.Module()
    model.diffusion_model, model.model_config = network, SimpleNamespace(unet_config={})
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def made_lora(network) -> dict[str, Pair]:
    lora = {}
    for name, layer in network.named_modules():
        try:
            in_comfyui(name)
        except KeyError:
            continue
        rows, columns = layer.weight.shape
        lora[name] = Pair(0.2 * torch.randn(4, columns), 0.2 * torch.randn(rows, 4), 6.0)
    return lora


def given() -> dict[str, torch.Tensor]:
    """Conditions without padding, which the two networks treat in ways of their own."""
    sizes = {"x": (CHANNELS, 3, 2, 2), "text": (7, TEXT), "glyphs": (5, GLYPHS), "picture": (4, PICTURE)}
    return {name: torch.randn(1, *size) for name, size in sizes.items()}


def run_ours(network, x, text, glyphs, picture):
    masks = {"encoder_attention_mask": torch.ones(1, 7), "encoder_attention_mask_2": torch.ones(1, 5)}
    texts = {"encoder_hidden_states": text, "encoder_hidden_states_2": glyphs, "image_embeds": picture}
    return network(x, timestep=torch.tensor([700.0]), return_dict=False, **texts, **masks)[0]


def run_theirs(patcher, x, text, glyphs, picture):
    times = torch.tensor([700.0])
    return patcher.model.diffusion_model(x.clone(), times, text, txt_byt5=glyphs, clip_fea=picture)


def test_the_file_has_the_effect_that_it_has_in_diffusers(host, ours, tmp_path):
    import comfy.sd

    inputs, lora = given(), made_lora(ours)
    base = run_ours(ours, **inputs)
    torch.testing.assert_close(run_theirs(host, **inputs), base, rtol=0, atol=1e-5)
    (path,) = write_lora(tmp_path, "a", lora, ["comfyui"])
    patched, _ = comfy.sd.load_lora_for_models(host, None, load_file(path), 1.0, 0.0)
    layers = {in_comfyui(name).name for name in lora}
    assert set(patched.patches) == {f"diffusion_model.{name}.weight" for name in layers}
    patched.patch_model(torch.device("cpu"))
    for name, pair in lora.items():
        ours.get_submodule(name).weight += pair.scale * pair.b @ pair.a
    changed = run_ours(ours, **inputs)
    effect = (changed - base).abs().max().item()
    assert effect > 0.1
    torch.testing.assert_close(run_theirs(patched, **inputs), changed, rtol=0, atol=2e-6 * effect)


def test_a_file_of_musubi_tuner_would_load_only_in_part(host, ours, tmp_path):
    """As users report; hence the conversion."""
    import comfy.sd

    lora = made_lora(ours)
    (path,) = write_lora(tmp_path, "a", lora, ["musubi"])
    patched, _ = comfy.sd.load_lora_for_models(host, None, load_file(path), 1.0, 0.0)
    assert len(patched.patches) < len({in_comfyui(name).name for name in lora})
