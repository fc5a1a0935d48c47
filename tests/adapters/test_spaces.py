"""Which latent spaces an adapter can map between."""

from dataclasses import replace

import pytest

from kvae_comfyui.adapters.spaces import SPACES, latent_space, spatial_ratio


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [
        ("hunyuan_video", "kvae_3d_1.0", 1),
        ("hunyuan_video", "kvae_3d_2.0_t4s8", 1),
        ("hunyuan_video_1.5", "kvae_3d_2.0_t4s16", 1),
        ("hunyuan_video", "kvae_3d_2.0_t4s16", 2),
        ("hunyuan_video_1.5", "kvae_3d_1.0", 2),
    ],
)
def test_the_ratio_is_that_of_the_pixels_of_one_latent(one, other, ratio):
    one, other = latent_space(one), latent_space(other)
    assert spatial_ratio(one, other) == spatial_ratio(other, one) == ratio
    h, other_h = (space.latent_shape(17, 96, 64)[2] for space in (one, other))
    assert max(h, other_h) == ratio * min(h, other_h)


def test_no_ratio_without_a_whole_number_of_rows_or_with_another_cadence():
    here = SPACES["hunyuan_video"]
    assert spatial_ratio(here, replace(here, spatial_factor=12)) is None
    assert spatial_ratio(here, replace(here, temporal_factor=8)) is None
    assert spatial_ratio(here, replace(here, spatial_factor=32)) == 4
