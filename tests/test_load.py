"""Loading is strict, knows both key layouts, and says what a wrong file is."""

import json

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLKVAEVideo
from safetensors.torch import save_file

from kvae_comfyui.kvae import FAMILY, KVAE, KVAEConfig, WeightsError, load_kvae, save_kvae
from kvae_comfyui.kvae.files import save_weights
from kvae_comfyui.kvae.load import config_from_shapes


def same(a, b):
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


def test_official_file_by_its_shapes(tmp_path, small_kvae):
    save_file(small_kvae.state_dict(), tmp_path / "kvae.safetensors")
    loaded = load_kvae(tmp_path / "kvae.safetensors")
    assert loaded.config == small_kvae.config
    assert same(loaded, small_kvae)


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_published_configs_are_read_off_the_shapes(config):
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in KVAE(config).state_dict().items()}
    assert config_from_shapes(shapes) == config


def test_official_config():
    """As the official repository's constructor takes it, and huggingface_hub writes it."""
    both = {"ch_mult": [0.125, 1, 2, 4, 8], "num_res_blocks": 2, "z_channels": 64, "temporal_compress_times": 4}
    both |= {"norm_type": "rms_norm", "temporal_compress_start_level": 1, "padding_mode": "zeros"}
    encoder = both | {"ch": 128, "downsample_version": 2, "double_z": True}
    decoder = both | {"ch": 256, "ch_mult": [0.0625, 1, 2, 4, 8]}
    values = {"model": {"encoder_params": encoder, "decoder_params": decoder}, "data": {"input_norm": "m11"}}
    assert KVAEConfig.from_dict(values) == FAMILY["2.0-t4s16"]
    assert KVAEConfig.from_dict({"model": {"encoder_params": {}, "decoder_params": {}}}) == FAMILY["1.0"]
    for config in FAMILY.values():
        assert KVAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_diffusers_folder(tmp_path, small_kvae):
    theirs = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_kvae(tmp_path)
    z = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_self_describing_file_keeps_what_shapes_cannot_tell(tmp_path):
    kvae = KVAE(KVAEConfig((16, 32), (16, 32), num_res_blocks=1, temporal_compress_times=2, norm_groups=4))
    save_kvae(tmp_path / "tiny.safetensors", kvae, torch.float16, {"recipe": "none"})
    loaded = load_kvae(tmp_path / "tiny.safetensors", torch.bfloat16)
    assert loaded.config.norm_groups == 4
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


def test_missing_and_wrong_tensors_are_named(tmp_path, small_kvae):
    state = small_kvae.state_dict()
    bias = state.pop("decoder.conv_out.conv.bias")
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(WeightsError, match=r"1 keys missing \['decoder.conv_out.conv.bias'\]"):
        load_kvae(tmp_path / "short.safetensors")
    save_file(state | {"decoder.conv_out.conv.bias": bias[:2].clone()}, tmp_path / "wrong.safetensors")
    with pytest.raises(WeightsError, match=r"decoder.conv_out.conv.bias is \[2\]; expected \[3\]"):
        load_kvae(tmp_path / "wrong.safetensors")


def test_other_files_are_called_by_their_name(tmp_path, small_kvae):
    hunyuan = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    for name, keys, message in (
        ("hunyuan", hunyuan.state_dict(), "a HunyuanVideo VAE; expected a KVAE-3D VAE"),
        ("wan", {"decoder.middle.0.residual.0.gamma": torch.ones(1)}, "a Wan VAE"),
        ("model", {"model.diffusion_model.x": torch.ones(1)}, "a checkpoint with a diffusion model"),
        ("other", {"x": torch.ones(1)}, "not a file this project knows"),
    ):
        save_file(keys, tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match=message):
            load_kvae(tmp_path / f"{name}.safetensors")


def test_damaged_files(tmp_path, small_kvae):
    save_file(small_kvae.state_dict(), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("cut", "text"):
        with pytest.raises(WeightsError, match="cut short or not a safetensors file"):
            load_kvae(tmp_path / f"{name}.safetensors")
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="a pickle can run code"):
        load_kvae(tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="no such file"):
        load_kvae(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds neither"):
        load_kvae(tmp_path / "empty")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(data)
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"ch": 40}))
    with pytest.raises(WeightsError, match="its config is not that of a KVAE-3D VAE"):
        load_kvae(tmp_path / "folder")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_weights(path, {"a": torch.ones(2)}, {"number": 1})  # metadata must be text
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
