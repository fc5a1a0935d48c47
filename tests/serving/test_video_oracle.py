"""The reader compared with ffmpeg, on many kinds of files that ffmpeg makes; skipped if ffmpeg is not installed."""

import os
from pathlib import Path

import numpy as np
import pytest

from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.video_index import index_video
from kvae_comfyui.serving.video_reader import read_pictures
from made_videos import all_frames, by_ffmpeg, ffmpeg

TEST, RATE = "testsrc2=s=160x128:r=25:d=3", "testsrc2=s=160x128:r=30000/1001:d=3"
SMOOTH = f"{TEST},gblur=sigma=2"  # swscale's versions place colours of half the resolution differently, by half a pixel
X264 = "-c:v libx264 -preset ultrafast -g 30 -bf 3 -pix_fmt yuv420p"
MATRICES = {"601": ("smpte170m", "smpte170m"), "709": ("bt709", "bt709"), "2020": ("bt2020", "bt2020nc")}


def tagged(matrix: str, limits: str, form: str = "yuv420p") -> str:
    to, tag = MATRICES[matrix]
    return f"-vf scale=out_color_matrix={to}:out_range={limits},format={form} -colorspace {tag} -color_range {limits}"


MADE = {  # name: (input of ffmpeg, options of its output)
    **{
        f"{matrix}-{limits}.mp4": (TEST, f"{tagged(matrix, limits)} -c:v libx264 -crf 5")
        for matrix in MATRICES
        for limits in ("tv", "pc")
    },
    **{
        f"ten-bit-{matrix}.mp4": (SMOOTH, f"{tagged(matrix, 'tv', 'yuv420p10')} -c:v libx264 -crf 5")
        for matrix in MATRICES
    },
    "h264.mp4": (TEST, X264),
    "h264.mov": (RATE, X264),
    "h264.mkv": (RATE, X264),
    "h264.ts": (TEST, X264),
    "h264.avi": (TEST, X264),
    "open-gop.mp4": (TEST, f"{X264} -x264-params open-gop=1"),
    "negative-start.mkv": (TEST, f"-output_ts_offset -1.5 -avoid_negative_ts disabled {X264}"),
    "late-start.mp4": (TEST, f"-output_ts_offset 5 {X264}"),
    "fragmented.mp4": (TEST, f"{X264} -movflags frag_keyframe+empty_moov"),
    "no-count.h264.mp4": (TEST, f"{X264} -f h264"),
    "no-count.mkv": (TEST, f"{X264} -f matroska -live 1"),
    "one-frame.mp4": (TEST, f"{X264} -frames:v 1"),
    "hevc.mp4": (TEST, "-c:v libx265 -preset ultrafast -x265-params log-level=error:keyint=30 -pix_fmt yuv420p"),
    "hevc-ten-bit.mp4": (
        SMOOTH,
        f"{tagged('709', 'tv', 'yuv420p10')} -c:v libx265 -preset ultrafast -x265-params log-level=error -crf 10",
    ),
    "vp8.webm": (TEST, "-c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -g 40 -b:v 300k -cpu-used 8"),
    "vp9.webm": (TEST, "-c:v libvpx-vp9 -lag-in-frames 16 -g 40 -deadline realtime -cpu-used 8"),
    "alpha.webm": (TEST, "-c:v libvpx-vp9 -pix_fmt yuva420p -auto-alt-ref 0 -deadline realtime -cpu-used 8"),
    "mpeg4.avi": (TEST, "-c:v mpeg4 -bf 2 -g 30 -q:v 3"),
    "xvid.avi": (TEST, "-c:v libxvid -bf 2 -g 30 -q:v 3"),  # B-frames packed into one packet
    "mpeg2.ts": (TEST, "-c:v mpeg2video -bf 2 -g 12 -b:v 3M"),
    "mjpeg.avi": (TEST, "-c:v mjpeg -pix_fmt yuvj420p"),
    "drops.avi": (TEST, "-vf select='not(mod(n,3))' -fps_mode passthrough -c:v mjpeg -pix_fmt yuvj420p"),
    "variable.mp4": (TEST, f"-vf setpts='if(lt(N,50),N,50+(N-50)*4)/25/TB' -fps_mode vfr {X264}"),
    "variable.mkv": (TEST, f"-vf setpts='if(lt(N,50),N,50+(N-50)*4)/25/TB' -fps_mode vfr {X264}"),
    "timelapse.mp4": ("testsrc2=s=160x128:r=1/5:d=200", X264),
    "4:4:4.mp4": (TEST, "-c:v libx264 -crf 5 -pix_fmt yuv444p"),
    "4:2:2.mov": (TEST, "-c:v mjpeg -q:v 2 -pix_fmt yuvj422p"),
    "odd-4:4:4.mp4": (f"{TEST},crop=149:121", "-c:v libx264 -crf 5 -pix_fmt yuv444p"),
    "odd-4:2:0.mkv": (f"{TEST},scale=149:121", "-c:v ffv1 -pix_fmt yuv420p"),
    "gray.mp4": (TEST, "-c:v libx264 -crf 5 -pix_fmt gray"),
    "gray-ffv1.mkv": (TEST, "-c:v ffv1 -pix_fmt gray"),
    "rgb.mkv": (TEST, "-c:v ffv1 -pix_fmt bgr0"),
    "rgb.mov": (TEST, "-c:v qtrle"),
    "palette.avi": (TEST, "-vf palettegen=stats_mode=single,scale=160:128:flags=neighbor -c:v rawvideo -pix_fmt pal8"),
    "with-alpha.mov": (TEST, "-c:v png -pix_fmt rgba"),
    "oblong-pixels.mp4": (TEST, f"-vf setsar=16/11 {X264}"),
    "interlaced.mp4": (
        "testsrc2=s=160x128:r=50:d=3",
        "-vf interlace=lowpass=0 -flags +ilme+ildct -c:v libx264 -crf 5 -g 12 -pix_fmt yuv420p",
    ),
    "interlaced.ts": (
        "testsrc2=s=160x128:r=50:d=3",
        "-vf interlace=lowpass=0:scan=bff -flags +ilme+ildct -c:v mpeg2video -b:v 5M -g 12 -pix_fmt yuv420p",
    ),
}
COPIED = {  # name: (source file, options before it, options after it)
    "trimmed.mp4": ("h264.mp4", "-ss 2.1", "-t 1.6"),
    "trimmed.mov": ("h264.mov", "-ss 1.3", ""),
    "trimmed.mkv": ("h264.mkv", "-ss 2.1", "-t 1.6"),
    "trimmed.ts": ("h264.ts", "-ss 2.1", "-copyts"),
    "out-of.mp4": ("h264.mkv", "", "-ss 1.7"),
    "turned-90.mp4": ("h264.mp4", "", "-metadata:s:v:0 rotate=90"),
    "turned-180.mp4": ("h264.mp4", "", "-metadata:s:v:0 rotate=180"),
    "turned-270.mp4": ("h264.mp4", "", "-metadata:s:v:0 rotate=270"),
    "turned-90.mkv": ("turned-90.mp4", "", ""),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) returns the path of a file; the first call makes the file."""
    folder = tmp_path_factory.mktemp("made")

    def get(name: str) -> Path:
        path = folder / name.replace(":", "")
        if path.exists():
            return path
        if name in COPIED:
            source, before, after = COPIED[name]
            ffmpeg(*before.split(), "-i", str(get(source)), "-c", "copy", *after.split(), into=path)
        else:
            source, options = MADE[name]
            ffmpeg("-f", "lavfi", "-i", source, *options.split(), into=path)
        return path

    return get


@pytest.mark.parametrize("name", [*MADE, *COPIED])
def test_frames_are_those_that_ffmpeg_shows(made, name):
    path = made(name)
    frames = all_frames(path)
    filters = ["-vf", "bwdif=mode=send_frame:deint=interlaced"] if "interlaced" in name else []
    expected = by_ffmpeg(path, *frames.shape[1:3], *filters)
    assert frames.shape == expected.shape
    errors = np.abs(frames.astype(np.int16) - expected).mean((1, 2, 3))
    if filters:
        errors = errors[1:]  # the first frame has none before it, and versions of bwdif differ there
    assert errors.max() <= (3 if "ten-bit" in name else 1)
    if len(frames) > 1 and np.abs(expected[0].astype(int) - expected[-1]).any():
        other = np.abs(frames[1:].astype(np.int16) - expected[:-1]).mean((1, 2, 3))
        assert np.median(other) > 1  # so that reading a neighbouring frame would fail
    places = sorted({0, 1, *range(len(frames) // 2, len(frames) - 1, 37), len(frames) - 1} & set(range(len(frames))))
    assert index_video(path).count == len(frames)
    assert np.array_equal(np.stack([each.rgb for each in read_pictures(path, places)]), frames[places])


@pytest.mark.parametrize("name", ["variable.mp4", "h264.mkv", "h264.mov", "drops.avi", "trimmed.mp4", "timelapse.mp4"])
def test_times_are_those_of_ffmpeg(made, name):
    path = made(name)
    index = index_video(path)
    listing = ffmpeg("-i", str(path), "-f", "framehash", "-hash", "crc32", "-fps_mode", "passthrough", "-").decode()
    rows = [line.split(",") for line in listing.splitlines() if not line.startswith("#")]
    (base,) = (line.split(":")[1] for line in listing.splitlines() if line.startswith("#tb 0"))
    top, bottom = map(int, base.split("/"))
    expected = [int(row[2]) * top / bottom for row in rows]
    found = [float(index.seconds(i)) + expected[0] for i in range(index.count)]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["h264.mkv", "h264.mov"])
def test_half_a_file_is_reported_as_cut_short(made, tmp_path, name):
    source = made(name)
    if name == "h264.mov":
        ffmpeg("-i", str(source), "-c", "copy", "-movflags", "faststart", into=tmp_path / "whole.mov")
        source = tmp_path / "whole.mov"
    path = tmp_path / f"cut{source.suffix}"
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    assert "cut short, it ends after" in index_video(path).lost


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "h264.ts", "mpeg2.ts"])
def test_a_damaged_file_has_as_many_frames_as_in_ffmpeg(made, tmp_path, name):
    data = bytearray(made(name).read_bytes())
    rng = np.random.default_rng(0)
    at = len(data) * 6 // 10
    data[at : at + 200] = rng.integers(0, 256, 200, np.uint8).tobytes()
    path = tmp_path / name
    path.write_bytes(data)
    frames = all_frames(path)
    assert len(frames) == len(by_ffmpeg(path, *frames.shape[1:3]))


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_of_hevc_is_refused(tmp_path, transfer):
    options = f"-vf format=yuv420p10 -color_trc {transfer} -colorspace bt2020nc -color_primaries bt2020 -frames:v 3"
    codec = "-c:v libx265 -preset ultrafast -x265-params log-level=error"
    ffmpeg("-f", "lavfi", "-i", TEST, *options.split(), *codec.split(), into=tmp_path / "a.mp4")
    with pytest.raises(WeightsError, match="HDR"):
        list(read_pictures(tmp_path / "a.mp4", range(3)))


def test_a_picture_on_the_cover_is_not_the_video(made, tmp_path):
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", "1", into=tmp_path / "cover.png")
    parts = ("-i", str(tmp_path / "cover.png"), "-i", str(made("h264.mp4")))
    mapped = ("-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg(*parts, *mapped, into=tmp_path / "a.mp4")
    assert index_video(tmp_path / "a.mp4").count == 75
    assert os.path.getsize(tmp_path / "a.mp4")
