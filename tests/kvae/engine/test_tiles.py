"""Spatial tiles are exact, or close if they are blended; halos are as large as they must be and no larger."""

import pytest
import torch

from kvae_comfyui.kvae import Execution, GroupNormStats
from kvae_comfyui.kvae.engine.tiles import needed_to_decode, needed_to_encode
from small_models import SMALL, VERSION_TWO, assert_same, clip, joined, latent, small


def test_tiles_of_version_one_are_exact_with_statistics_of_the_whole_picture():
    kvae = small("1.0")
    z = latent(kvae, 6, rows=28)
    x = clip(kvae, 21, rows=28)
    for stream, source, needed, side in (
        (kvae.decode_stream, z, needed_to_decode, 8),
        (kvae.encode_stream, x, needed_to_encode, 1),
    ):
        stats = GroupNormStats()
        whole = joined(stream(source, norm_stats=stats))
        _, end = needed(kvae.config, (0, 2))
        assert end < 28
        tile = source[:, :, :, : end * (8 // side)]
        assert_same(joined(stream(tile, norm_stats=stats))[:, :, :, : 2 * side], whole[:, :, :, : 2 * side])
        own = joined(stream(tile))[:, :, :, : 2 * side]
        assert (own - whole[:, :, :, : 2 * side]).norm() > 1e-3 * own.norm()


@pytest.mark.parametrize("name", VERSION_TWO)
def test_tiles_of_version_two_are_exact(name):
    kvae = small(name)
    x, z = clip(kvae, 6, 46, 2), latent(kvae, 2, 46, 2)
    reported = []
    assert_same(kvae.decode(z, Execution(tiles=(2, 2)), reported.append), kvae.decode(z))
    assert reported[-1] == 5 and reported == sorted(reported)
    x = x[..., :-3, :-1]  # sides that are not a multiple of a latent
    assert_same(kvae.encode(x, Execution(tiles=(2, 1))), kvae.encode(x))
    with pytest.raises(ValueError, match="a stream yields whole pictures"):
        next(kvae.decode_stream(z, Execution(tiles=(2, 1))))


@pytest.mark.parametrize("name", SMALL)
def test_blended_tiles_are_close_and_exact_with_an_overlap_of_twice_the_halo(name):
    """Exact if no norm runs over the picture: the values that are blended are then the same in both tiles."""
    kvae = small(name)
    x, z = clip(kvae, 6, 46, 2), latent(kvae, 2, 46, 2)
    reported = []
    for run, source, halo in ((kvae.decode, z, 18), (kvae.encode, x, 14)):
        whole, few, many = run(source), *(run(source, Execution(tiles=(2, 1), overlap=n)) for n in (2, 2 * halo))
        assert 0 < (few - whole).norm() < 0.5 * whole.norm()
        if kvae.config.norm_is_per_position:
            middle = whole.shape[3] // 2
            assert_same(many[:, :, :, middle], whole[:, :, :, middle])
    kvae.decode(z, Execution(tiles=(2, 1), overlap=4), reported.append)
    assert reported[-1] == 5 and reported == sorted(reported)


def test_version_one_has_no_exact_tiles():
    with pytest.raises(ValueError, match="this model has GroupNorm over the whole picture, so tiles cannot be exact"):
        small("1.0").decode(torch.randn(1, 16, 1, 4, 4), Execution(tiles=(2, 1)))


@pytest.mark.parametrize("name", VERSION_TWO)
def test_halos_are_all_that_is_needed_and_no_more(name):
    """A gradient shows on which latents a pixel depends, and on which pixels a latent does."""
    config = SMALL[name]
    kvae = small(name)
    side, middle = config.spatial_factor, 20
    z = latent(kvae, 1, 41, 1).requires_grad_()
    rows = kvae.decode(z)[..., middle * side : (middle + 1) * side, :].abs().sum()
    reached = torch.autograd.grad(rows, z)[0].abs().sum((0, 1, 2, 4)).nonzero()
    lo, hi = needed_to_decode(config, (middle, middle + 1))
    assert (reached.min(), reached.max() + 1) == (lo, hi)
    x = clip(kvae, 1, 41, 1).requires_grad_()
    reached = torch.autograd.grad(kvae.encode(x)[..., middle, :].abs().sum(), x)[0].abs().sum((0, 1, 2, 4)).nonzero()
    lo, hi = needed_to_encode(config, (middle, middle + 1))
    assert (reached.min() // side, reached.max() // side + 1) == (lo, hi)
