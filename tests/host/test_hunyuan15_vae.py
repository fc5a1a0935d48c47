"""ComfyUI's file of HunyuanVideo 1.5's VAE is read for training, and computes what ComfyUI's own module computes."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kvae_comfyui.training.vaes import load_hunyuan_vae
from small_models import assert_same

SIZES = {"block_out_channels": [16, 16, 16, 32, 64], "ffactor_spatial": 16, "ffactor_temporal": 4}


@pytest.fixture
def theirs(comfy):
    """ComfyUI's encoder and decoder, small and random."""
    package = pytest.importorskip("comfy.ldm.hunyuan_video.vae_refiner", reason="needs a ComfyUI with HunyuanVideo 1.5")
    options = {**SIZES, "in_channels": 3, "out_channels": 3, "z_channels": 32, "num_res_blocks": 1}
    coders = torch.nn.ModuleDict({"encoder": package.Encoder(**options), "decoder": package.Decoder(**options)})
    for name, parameter in coders.named_parameters():
        if name.endswith("gamma") or parameter.ndim < 2:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return coders.eval()


@pytest.fixture
def ours(theirs, tmp_path):
    """The file of those weights, with Tencent's config, as training loads it."""
    # some ComfyUIs make layers for a time embedding in the middle, which no file has
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "temb_proj" not in key}
    config = {"_class_name": "AutoencoderKLConv3D", **SIZES, "layers_per_block": 1, "latent_channels": 32}
    save_file(state, tmp_path / "hunyuanvideo15_vae_fp16.safetensors", {"config": json.dumps(config)})
    return load_hunyuan_vae(str(tmp_path / "hunyuanvideo15_vae_fp16.safetensors"), "cpu")


@torch.inference_mode()
def test_a_picture_is_that_of_comfyui(theirs, ours):
    x = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    z = theirs["encoder"](x)
    assert_same(ours.encode_unit(x), z)
    assert_same(ours.vae.decode(z).sample, theirs["decoder"](z))


@torch.inference_mode()
def test_a_clip_is_that_of_comfyui_once_its_attention_is_causal(theirs, ours):
    """ComfyUI's attention lets every frame see the later ones, too; Tencent's, diffusers' and musubi-tuner's do not."""
    x = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    z = ours.encode_unit(x)
    assert (theirs["encoder"](x) - z).norm() / z.norm() > 0.01
    for coder in theirs.values():
        coder.mid.attn_1.optimized_attention = causal
    assert_same(theirs["encoder"](x), z)
    assert_same(ours.vae.decode(z).sample, theirs["decoder"](z))


def causal(q, k, v):
    """Attention of all positions [B, C, t, h, w] to those of their own and earlier frames."""
    frame = torch.arange(q.shape[2]).repeat_interleave(q.shape[3] * q.shape[4])
    flat = [each.flatten(2).transpose(1, 2)[:, None] for each in (q, k, v)]
    y = F.scaled_dot_product_attention(*flat, attn_mask=frame[:, None] >= frame)
    return y[:, 0].transpose(1, 2).reshape(q.shape)
