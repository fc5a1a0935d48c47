"""Pictures of others: read as viewers show them, refused if they lie, cropped as in the pipeline."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.pictures import (
    MOST_BYTES,
    PictureError,
    bucket,
    cropped,
    jittered,
    read_opacity,
    read_picture,
)
from vfl_pictures import picture_bytes


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_pixels_are_those_of_the_file(form):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = read_picture(saved(Image.fromarray(pixels), form, lossless=True))
    assert picture.dtype == torch.uint8 and picture.is_contiguous()
    assert torch.equal(picture, torch.from_numpy(pixels).permute(2, 0, 1))


# how a viewer turns the stored pixels, by EXIF's number
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_picture_is_turned_as_its_exif_says(turn):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = read_picture(saved(Image.fromarray(pixels), exif=exif))
    assert np.array_equal(picture.permute(1, 2, 0).numpy(), TURNS[turn](pixels))


def test_transparency_is_laid_over_the_background():
    """a·colour + (1 − a)·background, to half a level and Pillow's rounding."""
    rgba = np.random.default_rng(2).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    data = saved(Image.fromarray(rgba))
    for background in ((0, 0, 0), (255, 128, 7)):
        alpha = rgba[..., 3:] / 255.0
        expected = alpha * rgba[..., :3] + (1 - alpha) * np.array(background)
        found = read_picture(data, background).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 1


def test_the_opacity_of_a_picture_is_read_if_it_has_any():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    found = read_opacity(saved(Image.fromarray(pixels, "RGBA")))
    assert found.shape == (3, 2, 3) and torch.equal(found[0], torch.from_numpy(pixels[..., 3].copy()))
    pixels[..., 3] = 255
    assert read_opacity(saved(Image.fromarray(pixels, "RGBA"))) is None
    assert read_opacity(saved(Image.new("I;16", (2, 2), 300))) is None
    with pytest.raises(PictureError):
        read_opacity(b"no picture")


def test_palettes_and_single_transparent_colours_are_transparent():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 10, 20, 30])
    palette.putdata([0, 1])
    assert read_picture(saved(palette)).flatten().tolist() == [200, 10, 100, 20, 50, 30]
    assert read_picture(saved(palette, transparency=0)).flatten().tolist() == [0, 10, 0, 20, 0, 30]
    rgb = Image.new("RGB", (1, 1), (9, 8, 7))
    assert read_picture(saved(rgb, transparency=(9, 8, 7)), (1, 2, 3)).flatten().tolist() == [1, 2, 3]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 200), Image.new("L", (1, 1), 0)])
    assert read_picture(saved(grey)).flatten().tolist() == [0, 0, 0]


def test_other_kinds_of_colour_become_rgb():
    deep = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16))
    assert read_picture(saved(deep))[0].flatten().tolist() == [0, 0x12, 0xFF]
    assert read_picture(saved(Image.new("1", (2, 2), 1))).flatten().tolist() == [255] * 12
    cmyk = read_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert (cmyk.float().mean((1, 2)) - torch.tensor([255.0, 0.0, 0.0])).abs().max() < 4


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(data)[:, 0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "ICO", "PPM", "EPS"])
def test_other_formats_are_refused_whatever_the_name(form):
    with pytest.raises(PictureError, match="not a JPEG, PNG or WebP file"):
        read_picture(saved(Image.new("RGB", (16, 16)), form))


@pytest.mark.parametrize(
    "side", [9000, 20_000, 60_000]
)  # beyond our limit, Pillow's for a warning, and its for an error
def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_decoded(side, recwarn):
    rows = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(PictureError, match="pixels"):
        read_picture(data)
    assert not recwarn.list


def test_a_file_that_is_too_large_is_not_looked_at():
    with pytest.raises(PictureError, match="expected 67,108,864 at most"):
        read_picture(bytes(MOST_BYTES + 1))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damage_is_a_picture_error_or_another_picture(form):
    """Cut short, or with changed bytes: never another exception, and never a line on the console."""
    good = picture_bytes(3, form, (40, 30))
    for cut in range(0, len(good) - 40, max(1, len(good) // 40)):
        with pytest.raises(PictureError):
            read_picture(good[:cut])
    rng = random.Random(4)
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            picture = read_picture(bytes(bad))
        except PictureError as error:
            assert "\n" not in str(error)
        else:
            assert picture.shape[0] == 3


def test_jitter_moves_a_part_of_the_long_side():
    """L 100, r 0.92, j 0.04: 92 pixels, whose centre is 50 ± 3.68, so their start 4 ± 3.68."""
    starts = set()
    for k in range(400):
        box = jittered(40, 100, 0.92, 0.04, Draws(k))
        assert (box.top, box.bottom, box.right - box.left) == (0, 40, 92)
        starts.add(box.left)
        tall = jittered(100, 40, 0.92, 0.04, Draws(k))
        assert (tall.left, tall.right, tall.top, tall.bottom) == (0, 40, box.left, box.right)
    assert starts == set(range(0, 9))


def test_jitter_never_leaves_the_picture():
    for k in range(300):
        draws = Draws("sizes", k)
        height, width = 1 + draws.below(300), 1 + draws.below(300)
        ratio, jitter = draws.between(0.05, 1.0), draws.between(0.0, 2.0)
        left, top, right, bottom = jittered(height, width, ratio, jitter, draws)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert jittered(30, 50, 1.0, 0.5, Draws(0)) == (0, 0, 50, 30)


def test_buckets_are_the_pipelines():
    """All (16a, 16b) with ab ≤ n = (target/16)², n < (a + 1)(b + 1) and ratio ≤ 4; of these, the nearest in
    proportions without going past them, in five decimal places."""
    for height, width, target in ((480, 848, 640), (1000, 1000, 640), (30, 3000, 640), (1920, 1080, 960), (5, 4, 32)):
        h, w = bucket(height, width, target)
        assert h % 16 == w % 16 == 0 and h * w <= target**2 and max(h, w) <= 4 * min(h, w)
        n = (target // 16) ** 2
        sides = [(a, b) for a in range(1, n + 1) for b in range(1, n // a + 1) if n < (a + 1) * (b + 1)]
        ratios = [round(a / b, 5) for a, b in sides if max(a, b) <= 4 * min(a, b)]
        safe = [r for r in ratios if (r <= height / width if height >= width else r >= height / width)]
        assert round(h / w, 5) == min(safe, key=lambda r: abs(r - height / width))


@pytest.mark.parametrize("height,width", [(480, 848), (853, 479), (64, 300), (33, 31)])
def test_cropping_is_the_pipelines(height, width):
    """Resized by Lanczos to cover, and cut from the centre."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    h, w = bucket(height, width, 320)
    image = Image.fromarray(pixels)
    scale = max(h / height, w / width)
    wide, tall = (w, int(height * scale + 1e-6)) if w / width == scale else (int(width * scale + 1e-6), h)
    whole = np.asarray(image.resize((wide, tall), Image.Resampling.LANCZOS))
    left, top = wide // 2 - w // 2, tall // 2 - h // 2
    expected = whole[top : top + h, left : left + w]
    assert np.array_equal(cropped(picture, None, (h, w)).permute(1, 2, 0).numpy(), expected)
    box = jittered(height, width, 0.7, 0.1, Draws(0))
    part = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)
    assert torch.equal(cropped(picture, box, (h, w)), cropped(part, None, (h, w)))


def test_no_border_is_left_uncovered():
    for k in range(60):
        draws = Draws("cover", k)
        height, width = 1 + draws.below(200), 1 + draws.below(200)
        white = torch.full((3, height, width), 255, dtype=torch.uint8)
        assert cropped(white, None, bucket(height, width, 64)).min() == 255
