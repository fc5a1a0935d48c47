"""The pixel convention of each VAE, and conversion between them."""

import torch

from kvae_comfyui.kvae.pixels import (
    HUNYUAN_HALF_RANGE,
    KVAE_HALF_RANGE,
    hunyuan_from_kvae,
    kvae_from_hunyuan,
    to_uint8,
    to_unit,
)

ALL = torch.arange(256, dtype=torch.uint8)


def test_every_value_survives_in_both_conventions():
    for half_range in (KVAE_HALF_RANGE, HUNYUAN_HALF_RANGE):
        assert torch.equal(to_uint8(to_unit(ALL, half_range), half_range), ALL)


def test_the_ends_of_the_range_are_as_published():
    assert to_unit(ALL, KVAE_HALF_RANGE)[[0, 128, 255]].tolist() == [-1, 0, 127 / 128]
    assert to_unit(ALL, HUNYUAN_HALF_RANGE)[[0, 255]].tolist() == [-1, 1]


def test_conversion_keeps_the_colours():
    h, k = to_unit(ALL, HUNYUAN_HALF_RANGE), to_unit(ALL, KVAE_HALF_RANGE)
    torch.testing.assert_close(kvae_from_hunyuan(h), k)
    torch.testing.assert_close(hunyuan_from_kvae(k), h)


def test_out_of_range_is_clipped():
    assert to_uint8(torch.tensor([-2.0, 2.0]), KVAE_HALF_RANGE).tolist() == [0, 255]
