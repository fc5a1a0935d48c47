"""What the head's trainer shows of a picture: the same for the same step, within bounds, and changed as it says."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from kvae_comfyui.training.vfl.views import Views, blurred, noisy, recoloured

PLAIN = Views(side=32, ratio=1, jitter=0, noise=0)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def picture() -> bytes:
    return png(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_without_changes_a_view_is_the_whole_picture(picture):
    assert torch.equal(PLAIN.at(0, 3)(picture), PLAIN.whole(picture))
    assert PLAIN.whole(picture).shape == (3, 32, 32) and PLAIN.whole(picture).dtype == torch.float32


@pytest.mark.parametrize("views", [Views(32), Views(32, flip=True, colour=0.5, blur=2, noise=0.3)], ids=["few", "all"])
def test_a_view_depends_on_seed_step_and_picture_alone(views, picture):
    first = views.at(1, 5)(picture)
    torch.randn(3)  # the global generator does not matter
    assert torch.equal(views.at(1, 5)(picture), first)
    assert first.min() >= 0 and first.max() <= 1
    assert not torch.equal(views.at(1, 6)(picture), first) and not torch.equal(views.at(2, 5)(picture), first)


def test_a_crop_keeps_nine_tenths_of_the_long_side():
    """A horizontal ramp shows which columns are seen."""
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], (50, 200, 3))
    starts = []
    for step in range(40):
        p = Views(50, noise=0).at(0, step)(png(np.ascontiguousarray(ramp)))
        low, high = p[0, 25, 0].item(), p[0, 25, -1].item()
        assert high - low == pytest.approx(0.9 * 49 / 50, abs=0.02)
        starts.append(low)
    assert max(starts) - min(starts) > 0.05


def test_half_of_the_pictures_are_mirrored(picture):
    views = Views(32, 1, 0, flip=True, noise=0)
    plain = PLAIN.whole(picture)
    seen = [views.at(0, step)(picture) for step in range(100)]
    mirrored = sum(torch.equal(each, plain.flip(-1)) for each in seen)
    assert 30 < mirrored < 70 and all(torch.equal(each, plain) or torch.equal(each, plain.flip(-1)) for each in seen)


def test_noise_is_gaussian_and_at_most_as_strong_as_asked_for():
    grey = png(np.full((32, 32, 3), 128, np.uint8))
    plain = PLAIN.whole(grey)
    strengths = [(Views(32, 1, 0, noise=0.1).at(0, step)(grey) - plain).std().item() for step in range(100)]
    assert max(strengths) < 0.105 and max(strengths) > 0.09 and min(strengths) < 0.01
    noise = noisy(torch.full((3, 64, 64), 0.5), 0.1, 7) - 0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.03) and abs(noise.mean().item()) < 0.003
    assert (noise.abs() < 0.1).float().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)


def test_a_blur_is_a_gaussian_of_that_width():
    point = torch.zeros(3, 31, 31)
    point[:, 15, 15] = 1
    seen = blurred(point, 2.0)
    places = torch.arange(31.0) - 15
    expected = torch.exp(-(places[:, None] ** 2 + places**2) / 8)
    torch.testing.assert_close(seen[1], expected / expected.sum(), atol=2e-4, rtol=0)
    assert torch.equal(blurred(point, 0.1), point)
    torch.testing.assert_close(blurred(torch.full((3, 8, 8), 0.3), 5.0), torch.full((3, 8, 8), 0.3))


def test_colours_change_by_their_factors():
    p = torch.rand(3, 8, 8) * 0.4 + 0.3
    assert torch.equal(recoloured(p, 1, 1, 1), p)
    torch.testing.assert_close(recoloured(p, 1.2, 1, 1), p * 1.2)
    torch.testing.assert_close(recoloured(p, 1, 0, 1), p.mean().expand_as(p))
    grey = recoloured(p, 1, 1, 0)
    torch.testing.assert_close(grey[0], 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2])
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


def test_transparent_parts_have_the_background():
    clear = png(np.zeros((8, 8, 4), np.uint8))
    views = Views(32, background=(255, 128, 0))
    assert views.whole(clear)[:, 0, 0].tolist() == pytest.approx([1, 128 / 255, 0])
