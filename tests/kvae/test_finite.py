"""A single NaN or infinity is found at any position, in every float type."""

from itertools import product

import pytest
import torch

from kvae_comfyui.kvae.finite import all_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
BAD = [
    (dtype, bad)
    for dtype, bad in product(DTYPES, (torch.nan, torch.inf, -torch.inf))
    if dtype != torch.float8_e4m3fn or bad != bad  # which has no infinity
]


@pytest.mark.parametrize(("dtype", "bad"), BAD, ids=str)
def test_a_single_value_that_is_not_finite_is_found(dtype, bad):
    for n in (1, 7, 4097):
        x = torch.randn(n)
        assert all_finite(x.to(dtype))
        for at in {0, n // 2, n - 1}:
            spoilt = x.clone()
            spoilt[at] = bad
            assert not all_finite(spoilt.to(dtype))
    assert all_finite(torch.full((3,), 3e38)) and all_finite(torch.zeros(0)) and all_finite(torch.zeros(2).to("meta"))
