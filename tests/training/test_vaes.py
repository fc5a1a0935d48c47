"""The Hunyuan VAE loads from every layout in use, and both VAEs read and write pixels in the same range."""

import json

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15
from safetensors.torch import save_file

from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.vaes import TINY, load_hunyuan_vae, load_kvae_for_training, weights_file


@pytest.fixture
def small_hunyuan():
    return AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4).eval()


@pytest.fixture
def small_hunyuan15():
    return AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 16, 32, 64), layers_per_block=1).eval()


def comfyui_keys(state):
    """A state with the keys of ComfyUI's file, derived by hand: levels count from full resolution on both sides."""
    out = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        words = rest.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            level = int(words[1]) if words[0] == "down_blocks" else 3 - int(words[1])
            side = words[0].removesuffix("_blocks")
            if words[2] == "resnets":
                tail = ".".join(words[4:]).replace("conv_shortcut", "nin_shortcut")
                rest = f"{side}.{level}.block.{words[3]}.{tail}"
            else:
                rest = f"{side}.{level}.{side}sample.{'.'.join(words[4:])}"
        elif words[0] == "mid_block" and words[1] == "resnets":
            rest = f"mid.block_{int(words[2]) + 1}.{'.'.join(words[3:])}"
        elif words[0] == "mid_block":
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            rest = f"mid.attn_1.{names[words[3]]}.{words[-1]}"
            if words[3] != "group_norm" and words[-1] == "weight":
                tensor = tensor[:, :, None, None, None]
        else:
            rest = rest.replace("conv_norm_out", "norm_out")
        out[f"{part}.{rest}" if rest else part] = tensor.clone()
    return out


def newer_comfyui_keys(state):
    """The same for HunyuanVideo 1.5, where Tencent, ComfyUI and diffusers count levels alike."""
    out = {}
    for key, tensor in state.items():
        part, block, *rest = key.split(".")
        if block in ("down_blocks", "up_blocks"):
            side = block.removesuffix("_blocks")
            kind = ["block", rest[2]] if rest[1] == "resnets" else [f"{side}sample"]
            words = [side, rest[0], *kind, *rest[3:]]
        elif block == "mid_block" and rest[0] == "resnets":
            words = ["mid", f"block_{int(rest[1]) + 1}", *rest[2:]]
        elif block == "mid_block":
            words = ["mid", "attn_1", rest[2].removeprefix("to_"), *rest[3:]]
        else:
            words = [block, *rest]
        out[".".join([part, *words])] = tensor.clone()
    return out


def same(vae, reference):
    state = reference.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in vae.vae.state_dict().items())


def test_a_hunyuan_vae_loads_from_a_folder_a_pipeline_and_a_file(tmp_path, small_hunyuan):
    small_hunyuan.save_pretrained(tmp_path / "pipeline" / "vae")
    assert same(load_hunyuan_vae(str(tmp_path / "pipeline" / "vae"), "cpu"), small_hunyuan)
    assert same(load_hunyuan_vae(str(tmp_path / "pipeline"), "cpu"), small_hunyuan)
    file = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    assert same(load_hunyuan_vae(str(file), "cpu"), small_hunyuan)


def test_a_file_with_comfyuis_keys_loads(tmp_path, small_hunyuan):
    config = {key: value for key, value in small_hunyuan.config.items() if not key.startswith("_")}
    path = tmp_path / "hunyuan_video_vae.safetensors"
    keys = comfyui_keys(small_hunyuan.state_dict())
    assert "decoder.up.3.upsample.conv.conv.weight" in keys and "encoder.mid.attn_1.q.weight" in keys
    save_file(keys, path, {"config": json.dumps(config)})
    assert same(load_hunyuan_vae(str(path), "cpu"), small_hunyuan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_of_hunyuan_video_15_with_comfyuis_keys_loads(tmp_path, small_hunyuan15, dtype, caplog):
    """Its config has Tencent's names, about which diffusers would warn."""
    config = {key: value for key, value in small_hunyuan15.config.items() if not key.startswith("_")}
    ratios = {name: config.pop(f"{name}_compression_ratio") for name in ("spatial", "temporal")}
    config |= {f"ffactor_{name}": ratio for name, ratio in ratios.items()} | {"sample_size": 256, "shift_factor": None}
    keys = newer_comfyui_keys({key: tensor.to(dtype) for key, tensor in small_hunyuan15.state_dict().items()})
    assert "decoder.up.0.upsample.conv.conv.weight" in keys and "encoder.mid.attn_1.proj_out.weight" in keys
    save_file(keys, tmp_path / "hunyuanvideo15_vae_fp16.safetensors", {"config": json.dumps(config)})
    vae = load_hunyuan_vae(str(tmp_path / "hunyuanvideo15_vae_fp16.safetensors"), "cpu")
    assert vae.space.name == "hunyuan_video_1.5" and vae.vae.dtype is torch.float32
    assert not caplog.records
    small_hunyuan15.load_state_dict({k: v.to(dtype).float() for k, v in small_hunyuan15.state_dict().items()})
    assert same(vae, small_hunyuan15)


def test_without_a_config_the_shapes_must_be_the_published_ones(tmp_path, small_hunyuan):
    """A file with other shapes and no config is refused, and a tensor that does not fit is named."""
    save_file(small_hunyuan.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match="tensors are not those of a HunyuanVideo VAE, first"):
        load_hunyuan_vae(str(tmp_path / "vae.safetensors"), "cpu")


def test_only_a_hub_id_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def refuse(repository, **_):
        asked.append(repository)
        raise OSError("no hub in tests")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for name in ("absent", "absent.safetensors", "./a/b", "a/b.safetensors", str(tmp_path / "absent")):
        with pytest.raises(WeightsError, match="no such file or folder"):
            load_hunyuan_vae(name, "cpu")
    with pytest.raises(WeightsError, match="holds neither"):
        load_hunyuan_vae(str(tmp_path), "cpu")
    assert not asked
    with pytest.raises(WeightsError, match="owner/name: no such file or folder, and the hub says: no hub in tests"):
        load_hunyuan_vae("owner/name", "cpu")
    assert asked == ["owner/name"]


def test_an_unreachable_hub_is_reported(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="nobody/nothing: no such file or folder, and the hub says"):
        load_kvae_for_training("nobody/nothing", "cpu")


def test_each_option_takes_the_tiny_vaes_of_its_kind_and_says_where_the_others_belong(tmp_path, monkeypatch):
    kinds = {"hunyuan": ("--hunyuan-vae", ["tiny", "tiny-1.5"]), "kvae": ("--kvae", ["tiny", "tiny-t4s16"])}
    for which, (_, names) in kinds.items():
        assert [weights_file(name, which) for name in names] == [TINY[which], TINY[which + names[1][4:]]]
    for which, other in (("hunyuan", "kvae"), ("kvae", "hunyuan")):
        (option, names), (right, others) = kinds[which], kinds[other]
        with pytest.raises(WeightsError) as found:
            weights_file(others[1], which)
        said = f"{option} {others[1]}: {others[1]} is a VAE for {right}; {option} takes {names[0]} or {names[1]}, "
        assert str(found.value) == said + "a folder, a .safetensors file or a hub id"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-1.5").touch()  # a file of that name is meant
    assert weights_file("tiny-1.5", "kvae").name == "tiny-1.5"


@pytest.mark.parametrize("load", [load_hunyuan_vae, load_kvae_for_training])
def test_pixels_are_uint8_in_and_0_to_255_out(load):
    vae = load("tiny", "cpu")
    frames = torch.randint(0, 256, (1, 3, 6, 32, 40), dtype=torch.uint8)
    z = vae.encode(frames)
    assert z.shape == (1, 16, 3, 4, 5) and z.dtype == torch.float32  # 6 frames are padded to 9
    y = vae.decode(z)
    assert y.shape == (1, 3, 9, 32, 40)
    assert y.min() >= 0 and y.max() <= 255
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(vae.encode(frames, generator), z)
    assert len(vae.digest) == 64
    assert vae.source == "tiny" and TINY["kvae"].exists()
