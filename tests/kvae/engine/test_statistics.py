"""GroupNorm's statistics: gathered without a copy, whatever the size of the map."""

import pytest
import torch

from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae.engine import statistics


@pytest.mark.parametrize("most_values", [1, 1000, 1 << 30], ids=["frame by row", "in parts", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(None), slice(1, -1)], ids=["whole", "slice"])
def test_cudas_way_gives_the_moments_of_a_whole_clip(monkeypatch, most_values, dtype, rows):
    """Each channel has a mean of its own, and the frames differ, so parts must be weighted and pooled."""
    monkeypatch.setattr(statistics, "MOST_VALUES", most_values)
    x = torch.randn(1, 8, 5, 7, 6, dtype=torch.float64) + 3 * torch.randn(1, 8, 5, 1, 1, dtype=torch.float64)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)[:, :, :, rows]
    with PeakMemory() as memory:
        mean, variance = statistics._cuda_moments(x)
    expected = x[0].double().flatten(1)
    torch.testing.assert_close(mean.double(), expected.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), expected.var(1, correction=0), rtol=1e-5, atol=1e-5)
    assert mean.dtype == torch.float32
    assert memory.peak < max(x.nbytes // 2, 64 * x.numel() // most_values)  # and not a copy of x


def test_strips_of_different_heights_are_weighted():
    x = torch.randn(2, 4, 3, 7, 5)
    norm = torch.nn.GroupNorm(2, 4)
    scale, shift = statistics.group_affine(norm, _Strips(x), [(0, 2), (2, 7)])
    torch.testing.assert_close(x * scale + shift, norm(x), rtol=1e-4, atol=1e-5)


class _Strips:
    """A feature map that is not in memory."""

    row_bytes = 1

    def __init__(self, x):
        self.x, self.shape = x, x.shape

    def __call__(self, lo, hi):
        return self.x[:, :, :, lo:hi]
