"""Frames are read as a player shows them. These files are made with PyAV; test_video_oracle compares with ffmpeg."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from conftest import ROOT
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.fit import fit_picture
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.serving.video_reader import read_pictures
from made_videos import all_frames, greys, make, picture, remux, which

FAR_IN = [100, 101, 102, 140, 179]  # of 180 frames; the first three share a key frame, the others have one each
KINDS = {  # container and codec; some packets say when their frames are shown, others do not
    "h264.mp4": ("libx264", {"bf": "3", "g": "30", "x264-params": "open-gop=1"}),
    "h264.mkv": ("libx264", {"bf": "3", "g": "30"}),
    "h264.ts": ("libx264", {"bf": "3", "g": "30"}),
    "h264.avi": ("libx264", {"bf": "3", "g": "30"}),
    "refreshed.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=30"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2", "g": "30", "qscale": "2"}),
    "mpeg2.ts": ("mpeg2video", {"bf": "2", "g": "12", "b": "2M"}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "40", "b": "200k", "cpu-used": "8"}),
    "vp9.webm": ("libvpx-vp9", {"lag-in-frames": "16", "g": "40", "deadline": "realtime", "cpu-used": "8"}),
    "mjpeg.avi": ("mjpeg", {}),
}


def test_frames_before_the_start_of_an_edit_list_are_not_shown(tmp_path):
    source = make(tmp_path / "a.mp4", greys(60), options={"g": "250", "bf": "2"})

    def earlier(_, packet):
        packet.pts -= 30 * 512  # of 1/12800 s
        packet.dts -= 30 * 512
        return packet

    path = remux(source, tmp_path / "trimmed.mp4", earlier, {"avoid_negative_ts": "disabled"})
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == 60
    assert index_video(path).count == 30
    assert which(all_frames(path)) == list(range(30, 60))


def test_frames_that_were_dropped_are_not_counted(tmp_path):
    """The header of this AVI counts the dropped frames."""
    path = make(tmp_path / "a.avi", greys(20), "mjpeg", "yuvj420p", times=range(0, 60, 3))
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames > 50
    index = index_video(path)
    assert (index.count, index.lost) == (20, "")
    assert which(all_frames(path)) == list(range(20))
    assert [index.seconds(i) for i in range(20)] == [Fraction(3 * i, 25) for i in range(20)]


def test_times_of_a_variable_frame_rate_are_exact(tmp_path):
    times = [*range(10), *range(10, 50, 4)]
    path = make(tmp_path / "a.mp4", greys(20), times=times)
    index = index_video(path)
    assert [index.seconds(i) for i in range(20)] == [Fraction(time, 25) for time in times]


def test_times_rounded_to_milliseconds_become_those_of_the_rate(tmp_path):
    path = make(tmp_path / "a.mkv", greys(40), rate=Fraction(30000, 1001))
    index = index_video(path)
    assert [index.seconds(i) for i in range(40)] == [Fraction(1001 * i, 30000) for i in range(40)]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_far_into_a_file_are_those_that_reading_from_the_start_gives(tmp_path, kind):
    codec, options = KINDS[kind]
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    moving = [np.roll(picture(), n, axis=1) for n in range(180)]
    path = make(tmp_path / kind, moving, codec, form, options=options)
    whole = all_frames(path)
    assert len(whole) == index_video(path).count == 180
    assert np.array_equal(np.stack([each.rgb for each in read_pictures(path, FAR_IN)]), whole[FAR_IN])
    assert list(read_pictures(path, [180, 500])) == []


def test_frames_far_into_a_file_are_reached_by_seeking(tmp_path):
    """Frames before them cannot be decoded here, so reading from the start would fail."""
    source = make(tmp_path / "a.mp4", greys(110), options={"g": "10", "bf": "0"})

    def spoilt(n, packet):
        if not 50 <= n < 80:
            return packet
        broken = av.Packet(bytes(packet.size))
        broken.pts, broken.dts, broken.time_base, broken.is_keyframe = packet.pts, packet.dts, packet.time_base, False
        return broken

    path = remux(source, tmp_path / "spoilt.mp4", spoilt)
    assert which(each.rgb for each in read_pictures(path, [0, 98, 99, 100])) == [0, 98, 99, 100]
    with pytest.raises(WeightsError, match="damaged: .* packets do not decode"):
        all_frames(path)


def test_a_packet_that_does_not_decode_is_skipped(tmp_path):
    source = make(tmp_path / "a.mp4", greys(60), options={"g": "1"})

    def spoilt(n, packet):
        if n != 20:
            return packet
        broken = av.Packet(bytes(packet.size))
        broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
        return broken

    path = remux(source, tmp_path / "spoilt.mp4", spoilt)
    assert which(all_frames(path)) == [n for n in range(60) if n != 20]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi"])
def test_a_file_that_is_cut_short_says_so(tmp_path, name):
    container = {"movflags": "faststart"} if name == "a.mp4" else {}
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    path = make(tmp_path / name, noise, container=container)
    assert index_video(path).lost == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert "cut short, it ends after" in index_video(path).lost
    assert 10 < index_video(path).count < 30


def test_a_video_that_ends_before_its_sound_is_complete(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("libx264", rate=25), file.add_stream("pcm_s16le", rate=8000, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for n, grey in enumerate(greys(10)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(grey))
            frame.pts = n
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        silence.sample_rate, silence.pts = 8000, 0
        file.mux([*sound.encode(silence), *sound.encode(None)])
    assert (index_video(path).count, index_video(path).lost) == (10, "")


def test_frames_may_change_size_within_the_stream(tmp_path):
    make(tmp_path / "small.avi", greys(5), "mjpeg", "yuvj420p")
    make(tmp_path / "large.avi", greys(10, 96, 128)[5:], "mjpeg", "yuvj420p")
    path = tmp_path / "both.mkv"
    with (
        av.open(str(tmp_path / "small.avi")) as small,
        av.open(str(tmp_path / "large.avi")) as large,
        av.open(str(path), "w") as file,
    ):
        stream, time = file.add_stream_from_template(small.streams.video[0]), 0
        for packet in (*small.demux(video=0), *large.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = time
                packet.stream, time = stream, time + 1
                file.mux(packet)
    pictures = list(read_pictures(path, range(20)))
    assert [each.rgb.shape[:2] for each in pictures] == [(48, 64)] * 5 + [(96, 128)] * 5
    assert which(each.rgb for each in pictures) == list(range(10))
    assert {fit_picture(each, 24, 32).shape for each in pictures} == {(3, 24, 32)}


def test_files_that_are_not_videos_are_refused(tmp_path):
    (tmp_path / "text.avi").write_text("this is not a video")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    for name, reason in (
        ("text.avi", "not a video"),
        ("list.mp4", "not a video"),
        ("pipe.mp4", "a pipe"),
        ("sound.mp4", "has no video stream"),
        ("absent.mp4", "no such file"),
    ):
        for read in (all_frames, index_video):
            with pytest.raises(WeightsError, match=reason):
                read(tmp_path / name)


def test_a_path_is_never_read_as_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:clip.mp4", "concat:a|b.mp4", "50% -x #1 ü.mp4"):
        make(tmp_path / "a.mp4", greys(6)).rename(tmp_path / name)
        assert which(all_frames(Path(name))) == list(range(6))


MEMORY = """
import resource, sys
from kvae_comfyui.training.data.videos import Clip, read_clip
from kvae_comfyui.serving.video_reader import read_pictures
next(read_pictures(sys.argv[1], [0]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read_clip(Clip(__import__("pathlib").Path(sys.argv[1]), 33, None), 48, 64).shape == (3, 33, 48, 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_grows_with_the_clip_not_with_the_file(tmp_path):
    frame = picture(360, 640)
    path = make(tmp_path / "a.mp4", [frame] * 500, form="yuv420p", options={"preset": "ultrafast", "crf": "30"})
    out = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 100  # MB; all 500 frames are 330
