"""Inspect Latent's report."""

import pytest
import torch

from kvae_comfyui.serving.inspect import describe

Z = torch.randn(1, 16, 3, 8, 4).repeat_interleave(2, 4)  # of pairs of equal neighbours: not noise


def test_the_report_states_frames_size_and_number_of_clips():
    assert "It decodes to 9 frames of 64 x 64 pixels, 1 clip." in describe(Z)
    assert "It decodes to 1 frame of 64 x 48 pixels, 2 clips." in describe(torch.randn(2, 32, 1, 3, 4))


def test_raw_and_scaled_latents_are_distinguished_by_their_deviation():
    assert "it looks scaled" in describe(Z)
    assert "it looks raw" in describe(Z / 0.476986)


def test_a_stated_space_is_not_guessed():
    report = describe(Z, "kvae_3d_1.0")
    assert "Space: kvae_3d_1.0 (known, not guessed from the shape alone)." in report
    assert "hunyuan_video" not in report


def test_latents_that_cannot_be_decoded_are_reported():
    assert "not sampled yet" in describe(torch.zeros(1, 16, 3, 8, 8))
    z = Z.clone()
    z[0, 0, 0, 0, 0] = float("inf")
    assert "1 of 3072 values are NaN or infinite" in describe(z)
    assert "no finite value" in describe(torch.full((1, 16, 1, 1, 1), float("nan")))


def test_audio_is_reported_after_the_video():
    audio = torch.randn(1, 8, 26, 16, dtype=torch.float16)
    audio[0, 0, 0] = float("nan")
    report = describe(Z, others=[audio, torch.ones(1, 5)]).splitlines()
    at = report.index(
        "With it comes audio, [1, 8, 26, 16], float16 on cpu. The model's audio VAE decodes it, not a video VAE."
    )
    assert report[:at] == describe(Z).splitlines()
    assert report[at + 1].startswith("16 of 3328 values are NaN")
    assert report[at + 2].startswith("Mean ")
    assert report[at + 3].startswith("With it comes a part 3, [1, 5]")
    assert "With it comes a part 2, [1, 4]" in describe(torch.ones(1, 8, 16), others=[torch.ones(1, 4)])


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
def test_equal_values_are_called_empty_whatever_the_value_is(value):
    report = describe(torch.full((1, 16, 3, 30, 52), value))
    assert report.endswith("All values are equal: this is an empty latent, not sampled yet.")
