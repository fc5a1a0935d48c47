"""KVAE Decode to Video, with inputs that only the API allows and sound that models make."""

import av
import pytest
import torch

from .test_nodes import NATIVE, with_hidden

OPTIONS = {"scaling": "raw", "memory_gb": 0.0, "fps": 24.0, "codec": "h264", "crf": 20, "filename_prefix": "odd/t"}


@pytest.fixture
def decode(load, comfy, base):
    """Run the node on a small latent; returns the files in its folder."""

    def run(**options):
        node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
        samples, vae = {"samples": torch.randn(1, 16, 7, 4, 4)}, load(latents=NATIVE)
        with torch.inference_mode():
            node.execute(samples=samples, vae=vae, **OPTIONS | options)
        folder = base / "output" / (OPTIONS | options)["filename_prefix"].rpartition("/")[0]
        return sorted(folder.iterdir())

    return run


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": 1e-9}, "fps is 1e-09"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"codec": "vp9"}, "codec is 'vp9'"),
        ({"crf": 99}, "crf is 99"),
        ({"audio": {"waveform": torch.zeros(2, 48000), "sample_rate": 48000}}, "audio: the waveform has shape"),
        ({"audio": {"waveform": torch.zeros(1, 2, 48000), "sample_rate": 44100.5}}, "audio: sample_rate is 44100.5"),
        ({"audio": {}}, "audio: dict without"),
        ({"filename_prefix": "odd/" + "n" * 245}, "choose a shorter"),
        ({"filename_prefix": "odd/" + "n" * 5000}, "choose a shorter"),
        ({"filename_prefix": "m" * 5000 + "/n"}, "choose a shorter"),
        ({"filename_prefix": "odd/a\0b"}, "not a name that a file can have"),
        ({"filename_prefix": "a\0b/c"}, "not a name that a file can have"),
    ],
)
def test_what_cannot_be_written_is_said_before_decoding(decode, base, options, found):
    before = set((base / "output").rglob("*"))
    with pytest.raises(ValueError, match=found) as error:
        decode(**options)
    assert "\n" not in str(error.value)
    assert not [path for path in set((base / "output").rglob("*")) - before if path.is_file()]


def test_odd_sound_does_not_cost_the_video(decode):
    waveform = torch.randn(1, 6, 192000) / 10
    waveform[0, 0, 5000] = torch.nan
    for n, rate in enumerate((192000, 12345)):
        files = decode(audio={"waveform": waveform, "sample_rate": rate}, filename_prefix=f"sound{n}/t")
        with av.open(str(files[-1])) as video:
            assert len(list(video.decode(video=0))) == 25
            assert video.streams.audio[0].layout.name == "stereo"


def test_names_are_counted_by_finished_videos_alone(decode, base):
    """A file that is being written, or that a kill has left, is hidden."""
    decode(filename_prefix="counted/t")
    (base / "output" / "counted" / ".kvae-0123456789abcdef.partial").touch()
    videos = [path.name for path in decode(filename_prefix="counted/t") if path.suffix == ".mp4"]
    assert videos == ["t_00001_.mp4", "t_00002_.mp4"]
