"""Metrics give the known values of known errors; SSIM is compared with torchmetrics."""

import math

import pytest
import torch

import needs
from kvae_comfyui.serving.metrics import as_text, compare, difference_picture, psnr, ssim, temporal_error
from kvae_comfyui.serving.sample_clip import sample_clip

X = sample_clip(4, 32, 48) * 0.5 + 0.2
ALTERNATING = torch.tensor([1.0, -1, 1, -1])[:, None, None, None]


def test_a_constant_error_is_a_colour_bias_without_flicker():
    found = compare(X + 0.1, X)
    assert found["psnr"] == pytest.approx(20, abs=1e-3)
    assert [found[key] for key in ("red", "green", "blue")] == pytest.approx([25.5] * 3, abs=1e-3)
    assert found["flicker"] == pytest.approx(0, abs=1e-3)


def test_an_alternating_error_flickers():
    assert compare(X + 0.1 * ALTERNATING, X)["flicker"] == pytest.approx(51, abs=1e-3)


def test_equal_videos_have_no_error():
    found = compare(X, X)
    assert (found["ssim"], found["flicker"]) == (pytest.approx(1), 0)
    assert found["psnr"] == pytest.approx(138.13, abs=0.01)
    assert compare(X[:1], X[:1])["flicker"] == 0


def test_videos_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="expected two of one shape"):
        compare(X[:1], X)


def test_metrics_of_clips_equal_those_of_compare():
    """The two differ in layout, units and precision, but not in meaning."""
    y = (X + 0.05 * torch.randn(X.shape)).clamp(0, 1)
    expected = compare(y, X)
    y_3THW, x_3THW = (255 * each.movedim(-1, 0) for each in (y, X))
    assert psnr(y_3THW, x_3THW) == pytest.approx(expected["psnr"], abs=1e-4)
    assert temporal_error(y_3THW, x_3THW) == pytest.approx(expected["flicker"], rel=1e-5)
    assert math.isnan(temporal_error(y_3THW[:, :1], x_3THW[:, :1]))


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.3])
def test_ssim_equals_that_of_torchmetrics(noise):
    torchmetrics = needs.package("torchmetrics.functional.image", "requirements-training.txt")
    x = sample_clip(1, 40, 50)[0]
    y = (x + noise * torch.randn(40, 50, 3)).clamp(0, 1)
    _, picture = torchmetrics.structural_similarity_index_measure(
        y.permute(2, 0, 1)[None], x.permute(2, 0, 1)[None], data_range=1.0, return_full_image=True
    )
    theirs = picture[..., 5:-5, 5:-5].mean()  # theirs also counts windows that reach over the edge
    assert ssim(y, x).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_the_difference_picture_is_grey_where_videos_agree():
    assert torch.equal(difference_picture(X, X), torch.full_like(X, 0.5))
    assert difference_picture(X + 0.01, X).mean().item() == pytest.approx(0.58, abs=1e-3)


def test_the_table_names_units_and_leaves_gaps():
    text = as_text({"A": compare(X + 0.1, X) | {"decode": 1.5}, "B": {"decode": 2.0}})
    assert text.splitlines()[0].split() == ["PSNR", "dB", "SSIM", "flicker", "red", "green", "blue", "decode", "s"]
    assert text.splitlines()[2].split() == ["B", "2.00"]
