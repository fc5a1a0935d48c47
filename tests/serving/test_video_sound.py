"""The sound of a written video is in time at any rate and mixed down as ffmpeg does; bad sound costs no video."""

import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kvae_comfyui.serving.sound import Sound, audio_of_clip
from kvae_comfyui.serving.video_reader import read_pictures
from kvae_comfyui.serving.video_writer import VideoWriter
from made_videos import ffmpeg, picture, sine

CLIP = torch.from_numpy(picture()).expand(20, -1, -1, -1)  # [T, H, W, 3]
SIZE = {"width": 64, "height": 48}


def heard(path: Path) -> tuple[np.ndarray, int]:
    """The sound of a file, float [C, N], and its rate."""
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1), file.streams.audio[
            0
        ].rate


@pytest.mark.parametrize("rate", [8000, 44100, 44100.0, 48000, 96000, 6000, 12345, 37800, 192000])
def test_sound_of_any_rate_is_in_time(tmp_path, rate):
    audio = sine(rate, channels=1)
    audio["waveform"][..., : rate // 2 if isinstance(rate, int) else 22050] = 0  # half a second of silence
    with VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, audio=audio) as writer:
        for frames in CLIP.split(7):
            writer.write(frames)
    samples, found = heard(tmp_path / "a.mp4")
    assert samples.shape[1] / found == pytest.approx(2, abs=0.05)  # as long as the video, in AAC's frames
    begins = np.flatnonzero(np.abs(samples[0]) > 0.1)[0] / found
    assert begins == pytest.approx(0.5, abs=0.01)
    spectrum = np.abs(np.fft.rfft(samples[0, found // 2 : found * 3 // 2]))
    assert spectrum.argmax() * found / (len(spectrum) * 2 - 2) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("channels", range(1, 9))
def test_more_than_two_channels_are_mixed_down_as_ffmpeg_does(tmp_path, channels):
    audio = sine(48000, channels)
    with VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, audio=audio) as writer:
        writer.write(CLIP)
    samples, _ = heard(tmp_path / "a.mp4")
    assert len(samples) == min(2, channels)
    raw = audio["waveform"][0].T.contiguous().numpy().astype("<f4")
    (tmp_path / "raw").write_bytes(raw.tobytes())
    source = ("-f", "f32le", "-ar", "48000", "-ac", str(channels), "-i", str(tmp_path / "raw"))
    mixed = np.frombuffer(ffmpeg(*source, "-ac", str(min(2, channels)), "-f", "f32le", "-"), "<f4")
    expected = mixed.reshape(-1, min(2, channels)).T[:, 48000:72000]
    found = samples[:, 48000:72000]
    loudness = np.sqrt((found**2).mean(1)), np.sqrt((expected**2).mean(1))
    np.testing.assert_allclose(*loudness, rtol=0.02)


def test_samples_that_are_not_finite_become_silence_with_a_warning(tmp_path, caplog):
    audio = sine(48000)
    audio["waveform"][0, 0, 24000], audio["waveform"][0, 1, 30000:30100] = torch.nan, torch.inf
    with caplog.at_level(logging.WARNING), VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, audio=audio) as writer:
        writer.write(CLIP)
    assert "NaN or infinite" in caplog.text
    samples, _ = heard(tmp_path / "a.mp4")
    assert np.isfinite(samples).all() and np.abs(samples).max() < 1
    assert len(list(read_pictures(tmp_path / "a.mp4", range(99)))) == 20


@pytest.mark.parametrize("seconds", [0.0, 0.5, 60.0])
def test_sound_of_any_length_does_not_change_the_length_of_the_video(tmp_path, seconds):
    with VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, audio=sine(48000, seconds=seconds)) as writer:
        writer.write(CLIP)
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert len(file.streams.audio) == (seconds > 0)
        assert file.duration == pytest.approx(2_000_000, abs=30_000)


def test_a_video_is_kept_if_its_sound_fails_late(tmp_path, caplog):
    audio = sine(48000)
    with caplog.at_level(logging.WARNING), VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, audio=audio) as writer:
        writer.write(CLIP[:10])
        writer.sound.samples = writer.sound.samples[:1]  # another layout than the encoder has begun with
        writer.write(CLIP[10:])
    assert "The sound of the video ends after" in caplog.text
    assert len(list(read_pictures(tmp_path / "a.mp4", range(99)))) == 20


@pytest.mark.parametrize(("sounds", "clip", "heard_is"), [(1, 1, 0), (2, 0, 0), (2, 1, 1), (3, 1, 0)])
def test_a_clip_has_its_own_sound_if_there_is_one_for_each_else_the_first(sounds, clip, heard_is):
    waveform = torch.arange(sounds).float()[:, None, None].expand(-1, 2, 100)
    audio = audio_of_clip({"waveform": waveform, "sample_rate": 8000}, clip, clips=2)
    assert Sound(audio).samples.unique().item() == heard_is
    assert Sound(audio).rate == 8000


def test_a_file_that_is_kept_unfinished_has_sound_up_to_its_end(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, audio=sine(48000, seconds=9), keep_unfinished=True)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(CLIP[:10])
        raise KeyboardInterrupt
    samples, _ = heard(tmp_path / "a.mp4")
    assert samples.shape[1] / 48000 == pytest.approx(1, abs=0.05)
