"""A frame looks as in a player: turned, in its colours, without comb, with square pixels; then it is fit to a size."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.display import Picture, deinterlace, to_picture
from kvae_comfyui.serving.fit import CROP, STRETCH, fit_picture, resize
from kvae_comfyui.serving.video_reader import read_pictures
from made_videos import all_frames, greys, make, picture, place

TURNS = {  # display matrix (a, b, c, d): its effect on a picture [H, W, 3]
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),  # clockwise
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_frames_are_rotated_and_mirrored_as_the_file_says(tmp_path, matrix):
    path = place(make(tmp_path / "a.mp4", [picture()] * 3), *matrix)
    (first, *_) = all_frames(path)
    expected = TURNS[matrix](picture())
    assert first.shape == expected.shape
    assert np.abs(first.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", ["BT.601", "BT.709", "BT.2020", "untagged"])
def test_colours_are_those_of_the_tagged_matrix_and_range(tmp_path, matrix, full):
    """Expected values by the standards: Y = Kr R + Kg G + Kb B; Cb and Cr are the scaled differences to B and R."""
    number, kr, kb = {
        "BT.601": (6, 0.299, 0.114),
        "BT.709": (1, 0.2126, 0.0722),
        "BT.2020": (9, 0.2627, 0.0593),
        "untagged": (2, 0.299, 0.114),
    }[matrix]
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).repeat(8, 0).repeat(8, 1)
    r, g, b = (rgb / 255).transpose(2, 0, 1)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    luma, chroma, black = (255, 255, 0) if full else (219, 224, 16)
    planes = np.stack([black + luma * y, 128 + chroma * cb, 128 + chroma * cr]).round().clip(0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
    tags = {"colorspace": number, "color_range": 2 if full else 1}
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "ffv1")):  # full range is a format of its own in the first
        path = make(tmp_path / name, [frame] * 2, codec, **tags)
        assert np.abs(all_frames(path)[0].astype(int) - rgb).max() <= 3


def interlaced(tmp_path: Path, count: int) -> tuple[Path, np.ndarray]:
    """A video of a bar that moves by four pixels with each field, and its frames made from the first fields only."""
    fields = np.full((2 * count, 64, 256, 3), 60, np.uint8)
    for n, each in enumerate(fields):
        each[:, 4 * n % 224 : 4 * n % 224 + 32] = 200
    woven = fields[::2].copy()
    woven[:, ::2] = fields[1::2, ::2]  # PyAV's encoder puts the lower field first
    options = {"g": "12", "bf": "0", "flags": "+ildct"}
    return make(tmp_path / "a.mp4", woven, options=options), fields[::2]


def test_interlaced_frames_have_no_comb(tmp_path):
    path, expected = interlaced(tmp_path, 40)
    frames = all_frames(path)
    assert frames.shape == expected.shape
    error = np.abs(frames.astype(int) - expected)
    assert error[:, 1::2].max() <= 2  # the first field is as it was
    assert error.mean() < 1  # a bar that is woven is off by 140 in 1.6 % of all pixels
    assert np.array_equal(np.stack([each.rgb for each in read_pictures(path, [36, 37, 38, 39])]), frames[36:])


@pytest.mark.skipif(av.library_versions["libavfilter"] < (11, 14), reason="needs libavfilter 11.14 or newer")
def test_an_interlaced_frame_is_the_same_wherever_reading_began(tmp_path):
    """After a frame that is not interlaced, whether or not interlaced frames came before it."""

    def decoded(path: Path) -> list[av.VideoFrame]:
        with av.open(str(path)) as file:
            return list(file.decode(video=0))

    path, _ = interlaced(tmp_path, 4)
    woven = decoded(path)
    (plain, *_) = decoded(make(tmp_path / "plain.mp4", np.full((3, 64, 256, 3), 90, np.uint8)))
    assert woven[0].interlaced_frame and not plain.interlaced_frame
    sequence = [woven[0], plain, woven[1], decoded(path)[1]]  # bwdif weaves a still area only if it was still before
    for n, frame in enumerate(sequence):
        frame.pts, frame.time_base = n, Fraction(1, 25)
    whole = [to_picture(frame, None).rgb for frame, _ in deinterlace(sequence)]
    part = [to_picture(frame, None).rgb for frame, _ in deinterlace(sequence[1:])]
    assert [pts for _, pts in deinterlace(sequence)] == [0, 1, 2, 3]
    assert np.array_equal(np.stack(whole[1:]), np.stack(part))
    assert np.array_equal(whole[1], to_picture(plain, None).rgb)  # a progressive frame is not changed


def test_pixels_that_are_not_square_are_shown_square(tmp_path):
    """A circle stored with pixels of 2:1 is a circle again; a rotation also rotates the shape of the pixels."""
    y, x = np.mgrid[:96, :96] - 47.5
    disc = np.where(x**2 + y**2 < 30**2, 220, 30).astype(np.uint8)[..., None].repeat(3, -1)
    narrow = disc.reshape(96, 48, 2, 3).mean(2).astype(np.uint8)
    path = make(tmp_path / "a.mp4", [narrow] * 3, sample_aspect_ratio=Fraction(2))
    target = torch.from_numpy(disc).permute(2, 0, 1)
    for matrix in ((1, 0, 0, 1), (0, 1, -1, 0)):
        (first, *_) = read_pictures(place(path, *matrix), range(3))
        assert (fit_picture(first, 96, 96, CROP).float() - target).abs().mean() < 4
    assert first.pixel_aspect == Fraction(1, 2)


def test_crop_keeps_the_middle_and_stretch_keeps_everything():
    wide = Picture(np.arange(200, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2))
    assert fit_picture(wide, 50, 50, CROP)[0, 0, [0, -1]].tolist() == [51, 148]
    assert fit_picture(wide, 100, 100, CROP).shape == (3, 100, 100)
    assert torch.equal(fit_picture(wide, 100, 100, CROP)[0, 0], torch.arange(50, 150).byte())
    assert torch.equal(fit_picture(wide, 100, 200, CROP), fit_picture(wide, 100, 200, STRETCH))
    assert fit_picture(wide, 50, 50, STRETCH)[0, 0, [0, -1]].tolist() == [2, 197]
    nearly = Picture(wide.rgb, Fraction(4096, 4083))  # as some of UCF101
    assert torch.equal(fit_picture(nearly, 100, 200, CROP)[0, 0], torch.arange(200).byte())
    tall = Picture(wide.rgb.swapaxes(0, 1).copy())
    assert torch.equal(fit_picture(tall, 100, 100, CROP)[0, :, 0], torch.arange(50, 150).byte())


def test_resizing_keeps_the_mean():
    x = torch.from_numpy(picture(96, 128)).permute(2, 0, 1)
    y = resize(x, 24, 40)
    assert y.shape == (3, 24, 40)
    torch.testing.assert_close(y.float().mean((1, 2)), x.float().mean((1, 2)), rtol=0.02, atol=1)


@pytest.mark.parametrize(("number", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name(tmp_path, number, name):
    path = make(tmp_path / "a.mp4", greys(3), color_trc=number, colorspace=9, color_primaries=9)
    with pytest.raises(WeightsError, match=f"a.mp4: HDR \\({name}\\) is not supported"):
        all_frames(path)
