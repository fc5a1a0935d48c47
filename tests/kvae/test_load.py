"""Loading is strict, supports both key layouts, and says what a wrong file is."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLKVAEVideo
from safetensors.torch import save_file

from kvae_comfyui.kvae import FAMILY, KVAE, KVAEConfig, WeightsError, load_kvae, save_kvae
from kvae_comfyui.kvae.files import save_weights
from kvae_comfyui.kvae.load import config_from_shapes, described_state, official_key, read_config
from kvae_comfyui.kvae.signature import same_weights, signature

TINY_CONFIG = KVAEConfig((16, 32), (16, 32), num_res_blocks=1, temporal_compress_times=2, norm_groups=4)


def same(a, b):
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


def test_an_official_file_without_a_config_loads(tmp_path, small_kvae):
    save_file(small_kvae.state_dict(), tmp_path / "kvae.safetensors")
    loaded = load_kvae(tmp_path / "kvae.safetensors")
    assert loaded.config == small_kvae.config
    assert same(loaded, small_kvae)


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_published_configs_follow_from_the_shapes(config):
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in KVAE(config).state_dict().items()}
    assert config_from_shapes(shapes) == config


def test_a_config_is_read_without_the_weights(tmp_path, monkeypatch):
    kvae = KVAE(TINY_CONFIG)
    save_kvae(tmp_path / "tiny.safetensors", kvae, torch.float16, {})
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    save_file(theirs.state_dict(), tmp_path / "other.safetensors")

    def read(weights, key):
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr("kvae_comfyui.kvae.load.Weights.__getitem__", read)
    assert read_config(tmp_path / "tiny.safetensors") == kvae.config
    with pytest.raises(WeightsError, match="this is a HunyuanVideo VAE; expected a KVAE-3D"):
        read_config(tmp_path / "other.safetensors")


def test_a_diffusers_folder_loads(tmp_path, small_kvae):
    theirs = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_kvae(tmp_path)
    z = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_a_saved_file_keeps_what_shapes_do_not_show(tmp_path):
    kvae = KVAE(TINY_CONFIG)
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


def test_files_of_other_models_are_recognised(tmp_path, small_kvae):
    hunyuan = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    newer = "a HunyuanVideo 1.5 VAE; expected a KVAE-3D VAE"
    for name, keys, message in (
        ("hunyuan", hunyuan.state_dict(), "a HunyuanVideo VAE; expected a KVAE-3D VAE"),
        # ComfyUI's file shares most names with a KVAE-3D 2.0
        ("hunyuan15", {f"encoder.mid.{each}.gamma": torch.ones(1) for each in ("block_1.norm1", "attn_1.norm")}, newer),
        ("wan", {"decoder.middle.0.residual.0.gamma": torch.ones(1)}, "a Wan VAE"),
        ("model", {"model.diffusion_model.x": torch.ones(1)}, "a checkpoint with a diffusion model"),
        ("other", {"x": torch.ones(1)}, "not a file this project knows"),
    ):
        save_file(keys, tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match=message):
            load_kvae(tmp_path / f"{name}.safetensors")


def test_damaged_and_missing_files_are_refused(tmp_path, small_kvae):
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
    with pytest.raises(WeightsError, match=re.escape("its config says encoder_widths is (40, 80, 160, 320), its tens")):
        load_kvae(tmp_path / "folder")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_weights(path, {"a": torch.ones(2)}, {"number": 1})  # metadata must be text
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_res_blocks": 10**9}, "its config says num_res_blocks is 1000000000, its tensors say 1"),
        ({"num_res_blocks": 1.5}, "num_res_blocks is 1.5"),
        ({"num_res_blocks": True}, "num_res_blocks is True"),
        ({"encoder_widths": [16] * 1000, "decoder_widths": [16] * 1000}, "its config says encoder_widths"),
        ({"encoder_widths": [16, 10**30]}, "its config says encoder_widths"),
        ({"encoder_widths": "wide"}, "its config says encoder_widths is wide"),
        ({"encoder_widths": None}, "its config says encoder_widths is None"),
        ({"z_channels": 10**12}, "its config says z_channels is 1000000000000"),
        ({"z_channels": -1}, "its config says z_channels"),
        ({"temporal_start_level": 10**18}, "its config says temporal_start_level is 1000"),
        ({"norm_groups": 0}, "its config is not that of"),
        ({"norm_groups": -4}, "norm_groups is -4"),
        ({"norm": "rms"}, "its config says norm is rms"),
        ({"padding": ["zeros"]}, "its config is not that of"),
        ({"ch": 1e308, "ch_mult": [1e308]}, "its config is not that of"),
        ({"ch": float("nan")}, "its config is not that of"),
        ({"ch": [0], "ch_mult": [10**12]}, "ch is [0]; expected float"),
        ({"model": 5}, "its config is not that of"),
        ({"model": {"encoder_params": [], "decoder_params": {}}}, "its config is not that of"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ("1" * 5000, "its config is not that of"),
        ("{", "its config is not that of"),
    ],
)
def test_a_config_asks_for_no_more_than_its_file_holds(tmp_path, change, words):
    """Wrong values and types are refused in one line, before anything is built."""
    kvae, path = KVAE(TINY_CONFIG), tmp_path / "kvae.safetensors"
    text = change if isinstance(change, str) else json.dumps(TINY_CONFIG.to_dict() | change)
    save_file(kvae.state_dict(), path, {"config": text})
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_kvae(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"encoder.down.99999999.block.0.conv1.conv.weight": (16, 16, 3, 3, 3)},
        {"encoder.down.x.block.0.conv1.conv.weight": (16, 16, 3, 3, 3)},
        {f"encoder.down.{i}.block.0.conv1.conv.weight": (1,) for i in range(2, 1000)},
        {f"encoder.down.0.block.{i}.conv1.conv.bias": (1,) for i in range(1, 1500)},
        {f"encoder.down.0.block.{i}.conv1.conv.bias": (1,) for i in range(1, 3000)},
    ],
    ids=["level 99999999", "level x", "a thousand levels", "blocks without end", "keys without end"],
)
def test_keys_ask_for_no_more_than_their_file_holds(tmp_path, extra):
    tensors = KVAE(TINY_CONFIG).state_dict() | {key: torch.zeros(shape) for key, shape in extra.items()}
    save_file(tensors, tmp_path / "kvae.safetensors")
    with pytest.raises(WeightsError, match="its config is not that of a KVAE-3D VAE"):
        load_kvae(tmp_path / "kvae.safetensors")


def test_weights_that_are_not_finite_floats_are_refused(tmp_path):
    state = KVAE(TINY_CONFIG).state_dict()
    config = {"config": json.dumps(TINY_CONFIG.to_dict())}
    key = "decoder.mid.block_1.conv1.conv.weight"
    for bad, words in (
        (torch.full_like(state[key], torch.nan), f"{key} holds values that are not finite"),
        (state[key].clone().flatten().index_fill(0, torch.tensor(7), torch.inf).view_as(state[key]), "not finite"),
        (state[key].to(torch.int8), f"{key} is torch.int8; expected a float type"),
    ):
        save_file(state | {key: bad}, tmp_path / "kvae.safetensors", config)
        with pytest.raises(WeightsError, match=words):
            load_kvae(tmp_path / "kvae.safetensors")


def test_a_config_may_be_a_tensor(tmp_path):
    """ComfyUI's Save VAE writes tensors only."""
    kvae = KVAE(replace(TINY_CONFIG, padding="zeros"))
    path = tmp_path / "vae.safetensors"
    save_file(described_state(kvae), path, {"prompt": "{}"})
    loaded = load_kvae(path)
    assert loaded.config == kvae.config
    assert same(loaded, kvae)
    assert loaded.state_dict().keys() == kvae.state_dict().keys()
    for bad in (torch.zeros(4, dtype=torch.uint8), torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)):
        save_file(described_state(kvae) | {"kvae_config": bad}, path)
        with pytest.raises(WeightsError, match="its config is not that of"):
            load_kvae(path)


def test_both_layouts_in_one_file_are_refused(tmp_path, small_kvae):
    state = small_kvae.state_dict()
    twice = state["encoder.norm_out.weight"].clone()
    save_file(state | {"encoder.norm_out.norm_layer.weight": twice}, tmp_path / "kvae.safetensors")
    with pytest.raises(WeightsError, match="the same tensors twice"):
        load_kvae(tmp_path / "kvae.safetensors")


# ---- signatures


def test_a_signature_distinguishes_weights_and_survives_conversions(tmp_path, small_kvae):
    known = signature(small_kvae.state_dict())
    assert len(known) == 64
    theirs = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1).eval()
    theirs.load_state_dict({diffusers_key(key, theirs): value for key, value in small_kvae.state_dict().items()})
    theirs.save_pretrained(tmp_path / "diffusers")
    assert signature(load_kvae(tmp_path / "diffusers").state_dict()) == known
    for dtype in (torch.bfloat16, torch.float16):
        save_kvae(tmp_path / "half.safetensors", small_kvae, dtype, {})
        half = load_kvae(tmp_path / "half.safetensors", dtype).to(memory_format=torch.channels_last_3d)
        assert signature(half.state_dict()) != known
        assert same_weights(known, signature(half.state_dict()))
    torch.manual_seed(7)
    assert not same_weights(known, signature(KVAE(small_kvae.config).state_dict()))
    further = {
        key: value + 0.2 * value.std() * torch.randn_like(value) for key, value in small_kvae.state_dict().items()
    }
    assert not same_weights(known, signature(further))
    assert not same_weights(known, known[:-1])
    with torch.device("meta"):
        assert signature(KVAE(small_kvae.config).state_dict()) == ()
    assert same_weights(known, ())  # an empty signature matches every other


def diffusers_key(key: str, theirs) -> str:
    """The key of diffusers' model for an official key."""
    (found,) = (each for each in theirs.state_dict() if official_key(each) == key)
    return found
