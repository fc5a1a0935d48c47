"""Errors by spatial frequency: a wave of known size and length is found where it belongs, and nowhere else."""

import math

import numpy as np
import pytest
import torch

from kvae_comfyui.training.evaluate.spectrum import BINS, Spectrum, frequencies


def wave(k_rows, k_columns, height=48, width=64, frames=3):
    """A cosine of so many half-cycles over the rows and columns, [1, 2, T, H, W]."""
    rows, columns = ((torch.arange(n) + 0.5) * math.pi / n for n in (height, width))
    frame = torch.cos(k_rows * rows)[:, None] * torch.cos(k_columns * columns)
    return frame.expand(1, 2, frames, height, width)


def bin_of(k_rows, k_columns, height=48, width=64):
    return min(BINS - 1, int(math.hypot(k_rows / (2 * height), k_columns / (2 * width)) * 2 * BINS))


@pytest.mark.parametrize(("k_rows", "k_columns"), [(0, 3), (10, 0), (20, 20), (40, 13), (47, 63)])
def test_a_wave_of_errors_is_in_its_bin_alone(k_rows, k_columns):
    n = bin_of(k_rows, k_columns)
    target = sum(wave(k, k) for k in range(1, 48))  # something in every bin
    same = sum(wave(k, k).square().mean().item() for k in range(1, 48) if bin_of(k, k) == n)
    spectrum = Spectrum()
    spectrum.add(0.5 * wave(k_rows, k_columns), target + 7)  # the mean of a channel does not count
    shares = spectrum.shares()
    assert shares[n] == pytest.approx(0.25 * wave(k_rows, k_columns).square().mean().item() / same, rel=1e-3)
    assert sum(share for i, share in enumerate(shares) if i != n) < 1e-6


def test_a_constant_error_is_the_lowest_frequency_and_a_bin_without_power_has_no_share():
    spectrum = Spectrum()
    spectrum.add(torch.ones(1, 2, 3, 48, 64), 2 * wave(0, 1))
    assert spectrum.shares() == [pytest.approx(0.5, rel=1e-3)] + [None] * (BINS - 1)


def test_bins_add_up_to_the_whole_error_over_clips_of_several_sizes():
    torch.manual_seed(3)
    spectrum, errors, targets = Spectrum(), 0.0, 0.0
    for size in ((16, 3, 12, 20), (16, 2, 30, 8)):
        error, target = torch.randn(size), 3 * torch.randn(size)
        spectrum.add(error, target)
        errors += error.square().sum().item()
        targets += (target - target.mean((1, 2, 3), keepdim=True)).square().sum().item()
    assert spectrum.error.sum().item() == pytest.approx(errors, rel=1e-5)
    assert spectrum.target.sum().item() == pytest.approx(targets, rel=1e-5)
    assert np.mean(spectrum.shares()) == pytest.approx(1 / 9, rel=0.1)  # white noise has as much at all frequencies


def test_frequencies_are_the_middles_of_the_bins():
    assert frequencies() == pytest.approx(np.arange(1, 2 * BINS, 2) / (4 * BINS))
