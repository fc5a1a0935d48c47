"""KVAE Decode to Video writes the frames that KVAE Decode shows, with sound, or says why it cannot."""

import av
import pytest
import torch

from kvae_comfyui.serving.sample_clip import sample_clip

from .conftest import NATIVE, with_hidden

OPTIONS = {"scaling": "raw", "memory_gb": 0.0, "fps": 24.0, "codec": "h264", "crf": 20, "filename_prefix": "odd/t"}


@pytest.fixture
def decode(load, comfy, base):
    """Run the node on a small latent; returns the files in the output folder."""

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
def test_a_video_that_cannot_be_written_is_refused_before_decoding(decode, base, options, found):
    before = set((base / "output").rglob("*"))
    with pytest.raises(ValueError, match=found) as error:
        decode(**options)
    assert "\n" not in str(error.value)
    assert not [path for path in set((base / "output").rglob("*")) - before if path.is_file()]


def test_a_video_is_written_whatever_its_sound(decode):
    waveform = torch.randn(1, 6, 192000) / 10
    waveform[0, 0, 5000] = torch.nan
    for n, rate in enumerate((192000, 12345)):
        files = decode(audio={"waveform": waveform, "sample_rate": rate}, filename_prefix=f"sound{n}/t")
        with av.open(str(files[-1])) as video:
            assert len(list(video.decode(video=0))) == 25
            assert video.streams.audio[0].layout.name == "stereo"


def test_names_are_counted_by_finished_videos_alone(decode, base):
    """A file that is being written, or that a killed process left, is hidden and not counted."""
    decode(filename_prefix="counted/t")
    (base / "output" / "counted" / ".kvae-0123456789abcdef.partial").touch()
    videos = [path.name for path in decode(filename_prefix="counted/t") if path.suffix == ".mp4"]
    assert videos == ["t_00001_.mp4", "t_00002_.mp4"]


def test_a_video_has_the_frames_that_decode_shows(run, load, comfy, base):
    vae = load(latents=NATIVE)
    (latent,) = run("KVAEEncode", pixels=sample_clip(30, 64, 96), vae=vae)
    (image,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    audio = {"waveform": torch.sin(torch.arange(96000) / 20)[None, None], "sample_rate": 48000}
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"fps": 25.0, "codec": "h264", "crf": 5, "filename_prefix": "shown/t"}
    with torch.inference_mode():
        out = node.execute(samples=latent, vae=vae, scaling="raw", memory_gb=0.0, audio=audio, **options)
    (path,) = (base / "output" / "shown").iterdir()
    assert [video.get_dimensions() for video in out.args[0]] == [(96, 64)]
    with av.open(str(path)) as video:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 25
        assert video.streams.video[0].codec_context.colorspace == 1  # BT.709, so that players show the same colours
        assert "workflow" in video.metadata
    assert len(frames) == 30
    with av.open(str(path)) as video:
        seconds = sum(frame.samples for frame in video.decode(audio=0)) / 48000
    assert abs(seconds - 30 / 25) < 0.05
    error = torch.stack(frames).float() / 255 - image
    assert error.square().mean().sqrt() < 0.06  # colour is halved in resolution
    assert error.mean((0, 1, 2)).abs().max() < 0.01  # but not shifted


@pytest.mark.parametrize("codec", ["h265", "av1"])
def test_a_video_may_be_h265_or_av1(load, comfy, base, codec):
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"fps": 23.976, "codec": codec, "crf": 30, "filename_prefix": f"{codec}/t"}
    with torch.inference_mode():
        node.execute(
            samples={"samples": torch.randn(1, 16, 1, 8, 8)}, vae=load(), scaling="raw", memory_gb=0.0, **options
        )
    (path,) = (base / "output" / codec).iterdir()
    with av.open(str(path)) as video:
        assert len(list(video.decode(video=0))) == 1
        assert float(video.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


def test_a_cancelled_video_leaves_no_file(run, load, comfy, base):
    vae = load(latents=NATIVE)
    node = with_hidden(comfy.classes["KVAEDecodeToVideo"])
    options = {"fps": 25.0, "codec": "h264", "crf": 5, "filename_prefix": "cancelled/t"}
    comfy.management.interrupt_current_processing()
    with torch.inference_mode(), pytest.raises(comfy.management.InterruptProcessingException):
        node.execute(samples={"samples": torch.randn(1, 16, 7, 4, 4)}, vae=vae, scaling="raw", memory_gb=0.0, **options)
    assert list((base / "output" / "cancelled").iterdir()) == []


def test_each_clip_of_a_batch_has_its_own_file_and_sound(run, load, comfy, base):
    vae, node = load(latents=NATIVE), with_hidden(comfy.classes["KVAEDecodeToVideo"])
    latent = {"samples": torch.randn(2, 16, 6, 4, 4)}
    (images,) = run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    waveform = torch.sin(torch.arange(96000) / 20).expand(2, 1, -1) * torch.tensor([0.0, 0.5])[:, None, None]
    audio = {"waveform": waveform, "sample_rate": 48000}
    with torch.inference_mode():
        out = node.execute(
            samples=latent, vae=vae, audio=audio, **OPTIONS | {"filename_prefix": "batch/t", "crf": 1, "fps": 21.0}
        )
    assert [result["filename"] for result in out.ui.as_dict()["images"]] == ["t_00001_.mp4", "t_00002_.mp4"]
    assert {result["subfolder"] for result in out.ui.as_dict()["images"]} == {"batch"}
    assert len(out.args[0]) == 2
    for image, result, silent in zip(images.split(21), out.ui.as_dict()["images"], (True, False), strict=True):
        path = base / "output" / "batch" / result["filename"]
        with av.open(str(path)) as video:
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
        with av.open(str(path)) as video:
            sound = [abs(frame.to_ndarray()).max() for frame in video.decode(audio=0)]
        assert (torch.stack(frames).float() / 255 - image).square().mean().sqrt() < 0.06
        assert (max(sound) < 0.01) == silent


def test_a_video_that_is_there_is_not_decoded_again(load, comfy, base):
    vae, node = load(latents=NATIVE), with_hidden(comfy.classes["KVAEDecodeToVideo"])
    latent, seen = {"samples": torch.randn(1, 16, 2, 4, 4)}, []
    vae.first_stage_model.on_progress = lambda *done: seen.append(done)
    audio = {"waveform": torch.zeros(1, 1, 9000), "sample_rate": 48000}

    def run(**options):
        seen.clear()
        with torch.inference_mode():
            out = node.execute(**{"samples": latent, "vae": vae} | OPTIONS | {"filename_prefix": "again/t"} | options)
        (result,) = out.ui.as_dict()["images"]
        return result["filename"], bool(seen)

    assert run() == ("t_00001_.mp4", True)
    assert run() == run(keep_unfinished=True) == ("t_00001_.mp4", False)
    assert run(samples=dict(latent)) == ("t_00001_.mp4", False)  # another dict of the same samples
    assert run(crf=30) == ("t_00002_.mp4", True)
    assert run(audio=audio) == ("t_00003_.mp4", True)
    assert run(audio=dict(audio)) == ("t_00003_.mp4", False)
    assert run(samples=latent | {"kvae_frames": 3}) == ("t_00004_.mp4", True)
    assert run(samples={"samples": latent["samples"].clone()}) == ("t_00005_.mp4", True)
    (base / "output" / "again" / "t_00001_.mp4").unlink()
    assert run() == ("t_00006_.mp4", True)


def test_an_error_leaves_the_finished_segments_if_they_are_to_be_kept(load, comfy, base, monkeypatch):
    vae, node = load(latents=NATIVE), with_hidden(comfy.classes["KVAEDecodeToVideo"])
    frames = vae.first_stage_model.decode_stream

    def small_card(z):
        yield from list(frames(z))[:2]
        raise torch.OutOfMemoryError("small card")

    options = OPTIONS | {"filename_prefix": "kept/t", "keep_unfinished": True}
    monkeypatch.setattr(type(vae.first_stage_model), "decode_stream", lambda self, z: small_card(z))
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        node.execute(samples={"samples": torch.randn(1, 16, 12, 4, 4)}, vae=vae, **options)
    with av.open(str(base / "output" / "kept" / "t_00001_.mp4")) as video:
        assert len(list(video.decode(video=0))) == 33
