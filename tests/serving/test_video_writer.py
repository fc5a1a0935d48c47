"""Rates, times, colours, tags and sound are written as given; wrong inputs are refused before the file is opened."""

import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from conftest import ROOT
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.serving.video_reader import read_pictures
from kvae_comfyui.serving.video_writer import CODECS, VideoWriter, exact_rate, write_video
from made_videos import picture, sine

CLIP = torch.from_numpy(picture()).expand(20, -1, -1, -1)  # [T, H, W, 3]
SIZE = {"width": 64, "height": 48}


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (119.88, Fraction(120000, 1001)),
        (24.0, 24),
        (24, 24),
        (12.5, Fraction(25, 2)),
        (0.2, Fraction(1, 5)),
        (25.005, Fraction(5001, 200)),
        (Fraction(1, 3), Fraction(1, 3)),
        (0.001, Fraction(1, 1000)),
    ],
)
def test_rates_are_exact(tmp_path, fps, exact):
    assert exact_rate(fps) == exact
    with VideoWriter(tmp_path / "a.mp4", **SIZE, fps=fps) as writer:
        writer.write(CLIP[:5])
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == exact
        assert [frame.pts * frame.time_base for frame in file.decode(video=0)] == [
            i / Fraction(exact) for i in range(5)
        ]


@pytest.mark.parametrize(
    "times",
    [
        [*range(10), *range(10, 50, 4)],
        [0, 1, 2, 50, 51, 52, 53, 100],
        [*range(5), *range(5, 65, 4)],
        [0, 60 * 25, 2 * 60 * 25],  # a picture a minute
        [0],
    ],
)
def test_frames_are_shown_at_their_times(tmp_path, times):
    seconds = [Fraction(time, 25) for time in times]
    write_video(tmp_path / "a.mp4", CLIP[: len(times)].permute(3, 0, 1, 2), seconds)
    index = index_video(tmp_path / "a.mp4")
    assert [index.seconds(i) for i in range(len(times))] == seconds
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.duration > seconds[-1] * 1_000_000  # so that players show the last frame


def test_frames_at_even_times_have_a_rate(tmp_path):
    rate = Fraction(24000, 1001)
    write_video(tmp_path / "a.mp4", CLIP.permute(3, 0, 1, 2), [i / rate for i in range(20)])
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == rate


@pytest.mark.parametrize("codec", CODECS)
def test_the_file_is_tagged_with_matrix_and_range(tmp_path, codec):
    if CODECS[codec] not in av.codecs_available:
        pytest.skip(f"needs a build of PyAV with {CODECS[codec]}")
    path = tmp_path / "a.mp4"
    with VideoWriter(path, **SIZE, fps=25, codec=codec, crf=5, metadata={"workflow": "{}"}) as writer:
        writer.write(CLIP / 255)
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert context.codec_tag == {"h264": "avc1", "h265": "hvc1", "av1": "av01"}[codec]
        assert file.metadata["workflow"] == "{}"
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # so that a page shows it before the download ends


@pytest.mark.parametrize("codec", CODECS)
def test_values_are_those_of_bt709_in_limited_range(tmp_path, codec):
    """Expected values by the standard, in the middle of patches of one colour: colour has half the resolution."""
    if CODECS[codec] not in av.codecs_available:
        pytest.skip(f"needs a build of PyAV with {CODECS[codec]}")
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 256, 192, 25, codec=codec, crf=1) as writer:
        writer.write(torch.from_numpy(colours.repeat(32, 0).repeat(32, 1)).expand(3, -1, -1, -1))
    with av.open(str(tmp_path / "a.mp4")) as file:
        planes = next(file.decode(video=0)).to_ndarray(format="yuv420p").astype(float)
    y = (planes[16:192:32, 16::32] - 16) / 219
    u, v = ((planes[192:].reshape(2, 96, 128)[i, 8::16, 8::16] - 128) / 224 for i in (0, 1))
    r, b = y + 1.5748 * v, y + 1.8556 * u
    g = (y - 0.2126 * r - 0.0722 * b) / 0.7152
    error = 255 * np.stack([r, g, b], -1) - colours
    assert np.abs(error).max() < 4
    assert np.abs(error.mean((0, 1))).max() < 0.2  # no shift


def test_values_are_rounded_and_clipped(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", **SIZE, fps=25, crf=0) as writer:
        writer.write(torch.full((2, 48, 64, 3), 1.5))
        writer.write(torch.full((2, 48, 64, 3), -0.5))
    values = [each.rgb.mean() for each in read_pictures(tmp_path / "a.mp4", range(4))]
    assert values == pytest.approx([255, 255, 0, 0], abs=1)


def audio(*shape: int, rate: object = 48000) -> dict:
    return {"audio": {"waveform": torch.zeros(shape), "sample_rate": rate}}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": 1e-9}, "fps is 1e-09"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": -24}, "fps is -24"),
        ({"fps": "24"}, "fps is '24'"),
        ({"codec": "vp9"}, "codec is 'vp9'"),
        ({"codec": None}, "codec is None"),
        ({"codec": ["h264"]}, "codec is \\['h264'\\]"),
        ({"crf": -5}, "crf is -5"),
        ({"crf": 99}, "crf is 99"),
        ({"crf": float("nan")}, "crf is nan"),
        ({"crf": "18"}, "crf is '18'"),
        ({"width": 63}, "a video of 63x48"),
        ({"height": 0}, "a video of 64x0"),
        (audio(480), "audio: the waveform has shape \\[480\\]"),
        (audio(2, 480), "audio: the waveform has shape \\[2, 480\\]"),
        (audio(0, 2, 480), "audio: the waveform has shape \\[0, 2, 480\\]"),
        (audio(1, 0, 480), "audio: 0 channels"),
        (audio(1, 9, 480), "audio: 9 channels"),
        (audio(1, 2, 480, rate=44100.5), "audio: sample_rate is 44100.5"),
        (audio(1, 2, 480, rate="48000"), "audio: sample_rate is '48000'"),
        (audio(1, 2, 480, rate=0), "audio: sample_rate is 0"),
        (audio(1, 2, 480, rate=float("nan")), "audio: sample_rate is nan"),
        (audio(1, 2, 480, rate=None), "audio: sample_rate is None"),
        ({"audio": {"waveform": [0.0], "sample_rate": 48000}}, "audio: the waveform is a list"),
        (
            {"audio": {"waveform": torch.zeros(1, 2, 9, dtype=torch.complex64), "sample_rate": 48000}},
            "audio: the waveform is of",
        ),
        ({"audio": {}}, "audio: dict without waveform or sample_rate"),
        ({"audio": {"waveform": torch.zeros(1, 2, 480)}}, "audio: dict without waveform or sample_rate"),
        ({"audio": []}, "audio: list without"),
        ({"audio": 5}, "audio: int without"),
    ],
)
def test_settings_that_cannot_be_written_are_refused_before_the_file_is_opened(tmp_path, options, found):
    with pytest.raises(ValueError, match=f"^{found}.*expected") as error:
        VideoWriter(**{"path": tmp_path / "a.mp4", **SIZE, "fps": 24} | options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 300 + ".mp4", "a\0b.mp4", "folder", "file/a.mp4"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError), VideoWriter(tmp_path / name, **SIZE, fps=24):
        pytest.fail("it was opened")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_frames_of_another_size_are_refused_and_leave_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="expected \\[T, 48, 64, 3\\]"),
        VideoWriter(tmp_path / "a.mp4", **SIZE, fps=24, audio=sine(48000)) as writer,
    ):
        writer.write(CLIP)
        writer.write(CLIP[:, :24])
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys, torch
from kvae_comfyui.serving.video_writer import VideoWriter
with VideoWriter(sys.argv[1], 64, 48, 24) as writer:
    for _ in range(30):
        writer.write(torch.rand(10, 48, 64, 3))
    os.kill(os.getpid(), 9)
"""


def test_a_killed_writers_file_is_hidden_and_deleted_by_the_next_video(tmp_path):
    path = tmp_path / "KVAE_00001_.mp4"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and left.stat().st_size > 0
    code = KILLED.replace("    os.kill(os.getpid(), 9)\n", "")
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 0
    assert list(tmp_path.iterdir()) == [path]


FULL = """
import resource, signal, sys, torch
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.video_writer import VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with VideoWriter(sys.argv[1], 64, 48, 24, crf=0) as writer:
        for _ in range(30):
            writer.write(torch.rand(10, 48, 64, 3))
except WeightsError as error:
    print(error)
"""


def test_a_full_disk_is_reported_in_one_line_and_leaves_no_file(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "a.mp4")], cwd=ROOT, capture_output=True, text=True
    )
    assert out.stdout.startswith(f"{tmp_path / 'a.mp4'}: File too large"), out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [1, 2])
def test_the_shortest_videos_are_written_every_time(tmp_path, frames):
    """x265 leaves the decoding times of so few frames undefined, so that some files failed."""
    for i in range(20):
        with VideoWriter(tmp_path / f"{i}.mp4", **SIZE, fps=10, codec="h265") as writer:
            writer.write(CLIP[:frames])
        with av.open(str(tmp_path / f"{i}.mp4")) as file:
            times = [(packet.pts, packet.dts) for packet in file.demux(video=0) if packet.size]
        assert [pts for pts, _ in times] == [dts for _, dts in times]


@pytest.mark.parametrize("codec", [codec for codec, name in CODECS.items() if name in av.codecs_available])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("card")])
def test_a_file_may_be_kept_unfinished(tmp_path, codec, error):
    with (
        pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)),
        VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, codec=codec, keep_unfinished=True) as writer,
    ):
        writer.write(CLIP[:7])
        raise error
    assert len(list(read_pictures(tmp_path / "a.mp4", range(99)))) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(("keep", "frames"), [(False, 7), (True, 0)])
def test_nothing_is_left_if_it_is_not_to_be_kept_or_there_is_nothing_to_keep(tmp_path, keep, frames):
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "a.mp4", **SIZE, fps=10, keep_unfinished=keep) as writer,
    ):
        writer.write(CLIP[:frames])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
