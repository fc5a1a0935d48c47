"""The audio part of a nested latent, decoded with the audio VAE of its model, for KVAE Decode to Video."""

import importlib
import json

import av
import pytest
import torch

from .conftest import NATIVE, with_hidden

AUDIO = torch.randn(2, 8, 6, 16)
CODER = {
    "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False, "in_channels": 2,
    "out_ch": 2, "ch": 8, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
}  # fmt: skip
CONFIG = {
    "audio_vae": {"model": {"params": {"ddconfig": CODER, "sampling_rate": 16000}}},
    "vocoder": {
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
    },
}


@pytest.fixture(scope="session")
def audio_vae(comfy):
    """LTX-2's audio VAE of ComfyUI, small and untrained, as ComfyUI loads it."""
    import comfy.sd

    module = pytest.importorskip("comfy.ldm.lightricks.vae.audio_vae", reason="needs a ComfyUI with LTX-2")
    metadata = {"config": json.dumps(CONFIG)}
    torch.manual_seed(0)
    try:
        made = module.AudioVAE(metadata=metadata)
    except TypeError:  # 0.8.0: it is no VAE of ComfyUI's, and loads itself
        made = module.AudioVAE({}, metadata)
    for name, value in made.state_dict().items():  # ComfyUI leaves them uninitialised
        if value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5)
        else:
            value.fill_(1 if "std" in name else 0.1)
    if hasattr(made, "device_manager"):
        return made
    return comfy.sd.VAE(sd=made.state_dict(), metadata=metadata)


@pytest.fixture
def nested(comfy):
    module = pytest.importorskip("comfy.nested_tensor", reason="needs a ComfyUI with nested latents")
    return lambda *parts: module.NestedTensor(parts)


@pytest.fixture
def decode(comfy):
    package = comfy.classes["KVAEDecodeToVideo"].__module__.rpartition(".")[0]
    soundtrack = importlib.import_module(f"{package}.soundtrack")

    def decode(vae, latent):
        with torch.inference_mode():
            return soundtrack.decode_soundtrack(vae, latent)

    return decode


def test_the_sound_is_that_of_comfyuis_own_decoder(run, decode, nested, audio_vae):
    latent = {"samples": nested(torch.zeros(2, 16, 3, 4, 4), AUDIO), "sample_rate": 16000}
    sound = decode(audio_vae, latent)
    (own,) = run("LTXVAudioVAEDecode", samples=latent, audio_vae=audio_vae)
    assert sound["sample_rate"] == own["sample_rate"] == 24000
    assert sound["waveform"].shape == own["waveform"].shape
    assert sound["waveform"].shape[:2] == (2, 2)
    loud = (5 * own["waveform"].std(dim=(1, 2), keepdim=True)).clamp(min=1)
    assert torch.equal(sound["waveform"], own["waveform"] / loud)


def test_what_cannot_be_decoded_is_refused_before_any_work(decode, nested, audio_vae, load):
    video = torch.zeros(1, 16, 3, 4, 4)
    for vae, samples, words in (
        (audio_vae, video, "has no audio part"),
        (audio_vae, nested(video, torch.zeros(1, 64, 26)), "this audio VAE reads latents of 8 channels"),
        (load(), nested(video, AUDIO), "not an audio VAE"),
        (None, nested(video, AUDIO), "audio_vae is a NoneType, not an audio VAE"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(vae, {"samples": samples})


def sound_of(path) -> torch.Tensor:
    """The samples of a file, [channels, samples]."""
    with av.open(str(path)) as video:
        assert video.streams.audio[0].sample_rate == 24000
        return torch.cat([torch.from_numpy(frame.to_ndarray()) for frame in video.decode(audio=0)], dim=1)


def test_each_video_of_a_batch_has_the_sound_of_its_latent(load, comfy, base, decode, nested, audio_vae):
    latent, vae = {"samples": nested(torch.randn(2, 16, 1, 4, 4), AUDIO)}, load(latents=NATIVE)
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"scaling": "raw", "memory_gb": 0.0, "fps": 8.0, "codec": "h264", "crf": 20}
    expected = decode(audio_vae, latent)["waveform"]
    loud = {"waveform": torch.ones(1, 1, 24000), "sample_rate": 24000}
    with torch.inference_mode():
        for name, audio in (("own", None), ("given", loud)):
            sounds = {"audio_vae": audio_vae, "audio": audio, "filename_prefix": f"{name}/t"}
            node.execute(samples=latent, vae=vae, **options, **sounds)
        again = node.execute(samples=latent, vae=vae, **options, audio_vae=audio_vae, filename_prefix="own/t")
    own = sorted((base / "output" / "own").iterdir())
    assert len(own) == len(again.args[0]) == 2  # nothing was decoded twice
    for path, waveform in zip(own, expected, strict=True):
        sound, n = sound_of(path), 24000 // 8
        assert sound.shape[0] == 2
        assert torch.corrcoef(torch.stack([sound[0, :n], waveform[0, :n]]))[0, 1] > 0.5
    assert sound_of(min((base / "output" / "given").iterdir())).shape[0] == 1
