"""A config is read in each spelling that people have on their disks, and gives the model that diffusers makes of it."""

import inspect
import json
import re

import pytest
import torch
from diffusers import AutoencoderKLKVAEVideo, Kandinsky6SRVAE
from safetensors.torch import save_file

from kvae_comfyui.kvae import FAMILY, KVAEConfig, WeightsError, load_kvae, pad_frames
from small_models import SMALL, assert_same, clip, latent, small


def halves(encoder: dict, decoder: dict, both: dict) -> tuple[dict, dict]:
    """The arguments of the official constructors, with some that do not define the model."""
    ours = {"num_res_blocks": 2, "temporal_compress_times": 4, "resolution": 0} | both
    encoder = {"in_channels": 3, "out_ch": "None", "double_z": True, "fix_pxs": True, **ours, **encoder}
    return encoder, {"in_channels": "None", "out_ch": 3, **ours, **decoder}


# the values of https://huggingface.co/kandinskylab/Kandinsky-6.0-VSR-5s-Diffusers, vae/config.json
T4S16 = {"norm_type": "rms_norm", "padding_mode": "zeros", "temporal_compress_start_level": 1, "z_channels": 64}
ENCODER = {"ch": 128, "ch_mult": [0.125, 1, 2, 4, 8], "downsample_version": 2}
DECODER = {"ch": 256, "ch_mult": [0.0625, 1, 2, 4, 8]}
PIPELINE = {"vae_type": "video-kvae", "scaling_factor": 0.910344004631042, "spatial_factor": 16, "temporal_factor": 4}


def nested(encoder: dict = ENCODER, decoder: dict = DECODER, **both) -> dict:
    pair = halves(encoder, decoder, T4S16 | both)
    return PIPELINE | dict(zip(("encoder_config", "decoder_config"), pair, strict=True))


def flat(encoder: dict = ENCODER, decoder: dict = DECODER, **both) -> dict:
    own = {f"decoder_{name}": value for name, value in decoder.items()}
    return PIPELINE | halves(encoder, {}, T4S16 | both)[0] | {"out_channels": 3} | own


def official(encoder: dict, decoder: dict, **both) -> dict:
    pair = halves(encoder, decoder, both)
    model = dict(zip(("encoder_params", "decoder_params"), pair, strict=True))
    return {"model": model, "data": {"input_norm": "m11"}, "common": {"experiment_name": "vae"}}


def defaults(cls: type) -> dict:
    """What diffusers writes into config.json for a model with default arguments."""
    arguments = inspect.signature(cls.__init__).parameters.items()
    values = {name: argument.default for name, argument in arguments if name != "self"}
    return json.loads(json.dumps({"_class_name": cls.__name__, "_diffusers_version": "0.42.1"} | values))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (nested(), "2.0-t4s16"),
        (flat(), "2.0-t4s16"),
        (defaults(Kandinsky6SRVAE), "2.0-t4s16"),
        ({"encoder_block_out_channels": [16, 128, 256, 512, 1024]}, "2.0-t4s16"),
        (official(ENCODER, DECODER, **T4S16), "2.0-t4s16"),
        (official(ENCODER, DECODER, **T4S16)["model"], "2.0-t4s16"),
        (official({"downsample_version": 2}, {}, norm_type="rms_norm"), "2.0-t4s8"),
        (official({"ch": 128}, {"ch": 128}, z_channels=16), "1.0"),
        ({"model": {"encoder_params": {}, "decoder_params": {}}}, "1.0"),
        ({"vae_type": "video-kvae"}, "1.0"),
        (defaults(AutoencoderKLKVAEVideo), "1.0"),
        *((config.to_dict(), name) for name, config in FAMILY.items()),
    ],
)
def test_published_configs_are_read(values, name):
    assert KVAEConfig.from_dict(json.loads(json.dumps(values))) == FAMILY[name]


# ---- the model that a config describes

SMALL_ENCODER = {"ch": 8, "ch_mult": [0.5, 1, 1, 2, 2], "num_res_blocks": 1, "downsample_version": 2}
SMALL_DECODER = {"ch": 16, "ch_mult": [0.25, 1, 1, 1, 2], "num_res_blocks": 1}
SPELLED = {
    "nested": nested(SMALL_ENCODER, SMALL_DECODER),
    "flat": flat(SMALL_ENCODER, {"ch": 16, "ch_mult": [0.25, 1, 1, 1, 2]}),
    "official": official(SMALL_ENCODER, SMALL_DECODER, **T4S16),
    "diffusers": None,  # what save_pretrained writes
    "none": {},  # no config.json
}


def saved(folder, theirs, values: dict | None):
    """A pipeline's folder with this VAE, and its config in some spelling."""
    theirs.save_pretrained(folder / "vae")
    if values == {}:
        (folder / "vae" / "config.json").unlink()
    elif values is not None:
        (folder / "vae" / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def kandinsky_6():
    """Diffusers' VAE of Kandinsky 6's super-resolution, small, with random weights."""
    ours = small("2.0-t4s16")
    theirs = Kandinsky6SRVAE(
        encoder_block_out_channels=ours.config.encoder_widths,
        decoder_block_out_channels=ours.config.decoder_widths,
        layers_per_block=1,
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval().requires_grad_(False)


@pytest.mark.parametrize("spelling", SPELLED)
def test_a_folder_gives_the_vae_of_kandinsky_6(tmp_path, kandinsky_6, spelling):
    ours = load_kvae(saved(tmp_path, kandinsky_6, SPELLED[spelling]))
    assert ours.config == SMALL["2.0-t4s16"]
    with torch.no_grad():
        for frames in (1, 5, 17, 18, 21, 33):
            x = clip(ours, frames, rows=1, columns=2)
            posterior = ours.posterior(x)
            theirs = kandinsky_6.encode(pad_frames(x)).latent_dist.parameters
            assert_same(torch.cat([posterior.mean, posterior.logvar], 1), theirs, 2e-6)
            z = latent(ours, posterior.mean.shape[2], rows=1, columns=2)
            assert_same(ours.decode(z), kandinsky_6.decode(z).sample, 2e-6)


@pytest.mark.parametrize("values", [None, official({"ch": 32}, {"ch": 32}, ch_mult=[1, 2, 2, 2], num_res_blocks=1)])
def test_a_folder_gives_the_video_vae_of_diffusers(tmp_path, values):
    theirs = AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1).eval().requires_grad_(False)
    ours = load_kvae(saved(tmp_path, theirs, values))
    with torch.no_grad():
        for frames in (1, 5, 17, 18, 21, 33):
            x = clip(ours, frames)
            z = ours.encode(x)
            assert_same(z, theirs.encode(pad_frames(x)).latent_dist.mode())
            whole = 17 if frames in (18, 21) else frames  # diffusers drops frames of a last segment of one latent
            assert_same(ours.decode(z)[:, :, :whole], theirs.decode(z).sample[:, :, :whole])


def test_metadata_may_have_any_spelling(tmp_path):
    path = tmp_path / "kvae.safetensors"
    for values in filter(None, SPELLED.values()):
        save_file(small("2.0-t4s16").state_dict(), path, {"config": json.dumps(values)})
        assert load_kvae(path).config == SMALL["2.0-t4s16"]


# ---- configs that are wrong


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


FLAT, NESTED = SPELLED["flat"], SPELLED["nested"]
DIFFUSERS = defaults(Kandinsky6SRVAE) | {"layers_per_block": 1}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (without(FLAT, "norm_type"), "its config says norm is group, its tensors say rms"),
        (without(FLAT, "downsample_version"), "its config says downsample_version is 1, its tensors say 2"),
        (
            without(FLAT, "decoder_ch"),
            "its config says decoder_widths is (2, 8, 8, 8, 16), its tensors say (4, 16, 16, 16, 32)",
        ),
        (FLAT | {"z_channels": 16}, "its config says z_channels is 16, its tensors say 64"),
        (FLAT | {"ch": "8"}, "ch is '8'; expected float"),
        (FLAT | {"ch_mult": [0] * 10**5}, "its config says encoder_widths is (0, 0"),
        (FLAT | {"decoder_ch": [0], "decoder_ch_mult": [10**12]}, "ch is [0]; expected float"),
        (FLAT | {"decoder_ch_mult": [1e400]}, "its config is not that of"),
        (FLAT | {"norm_type": "layer_norm"}, "its config says norm is layer_norm, its tensors say rms"),
        (FLAT | {"norm_type": ["rms_norm"]}, "norm_type is ['rms_norm']; expected str"),
        (FLAT | {"padding_mode": "circular"}, "padding is 'circular'; expected one of ('replicate', 'zeros')"),
        (without(NESTED, "decoder_config"), "decoder_config is None; expected an object"),
        (NESTED | {"encoder_config": [[]] * 10**4}, "encoder_config is [[], [], [], "),
        (NESTED | {"decoder_config": SMALL_DECODER}, "encoder_config says z_channels is 64, decoder_config says 16"),
        (DIFFUSERS, "its config says encoder_widths is (16, 128, 256, 512, 1024), its tensors say (4, 8, 8, 16, 16)"),
        (DIFFUSERS | {"encoder_block_out_channels": 16}, "encoder_block_out_channels is 16"),
        ({"hidden_size": 5}, "no ch, encoder_config, encoder_block_out_channels, model or encoder_widths in it"),
        ({"model": "kvae"}, "model is 'kvae'; expected an object"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line_that_names_both(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(small("2.0-t4s16").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_kvae(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
