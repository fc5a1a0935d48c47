"""The path from noise to a clip, against diffusers' scheduler and closed forms."""

import numpy as np
import pytest
import torch

import needs
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.path import Steps, band_of, band_of_sigma, clean, noise, rollout, sigmas, timestep

N, SHIFT = 25, 5.0
SEEDS = range(1000)


@pytest.mark.parametrize("steps, shift", [(25, 5.0), (50, 7.0), (14, 5.0), (1, 5.0)])
def test_the_noise_levels_are_the_schedulers(steps, shift):
    diffusers = needs.package("diffusers", "requirements-vfl.txt")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    assert torch.equal(sigmas(steps, shift), scheduler.sigmas)
    assert torch.equal(timestep(sigmas(steps, shift)[:-1], torch.float32), scheduler.timesteps)


def test_some_noise_levels():
    """s l / (1 + (s − 1) l) with s = 5 and l = 11/25, 5/25, 1/25."""
    assert sigmas(N, SHIFT)[[14, 20, 24]].tolist() == pytest.approx([55 / 69, 5 / 9, 5 / 29], abs=1e-6)


def test_harvested_steps_lie_where_they_should():
    drawn = [Steps(tail=0).draw(Draws(seed), N, band_of(N, 0.60, 0.85)) for seed in SEEDS]
    assert {each.deep for each in drawn} == set(range(14, 21))
    assert all(each.indices[-1] == each.deep and len(each.indices) == 3 for each in drawn)
    assert {each.indices[0] for each in drawn} == {5, 6, 7}
    assert {each.indices[1] for each in drawn} == {11, 12, 13}


def test_the_tail_lies_below_the_deep_step_everywhere():
    drawn = [Steps(tail=1).draw(Draws(seed), N, (20, 20)) for seed in SEEDS]
    assert {each.indices[-1] for each in drawn} == {21, 22, 23, 24}
    assert all(each.indices[-2] == each.deep == 20 for each in drawn)
    assert Steps(tail=3).draw(Draws(0), N, (23, 23)).indices[-2:] == (23, 24)  # there are no more


def test_random_steps_are_distinct_and_reach_every_index():
    drawn = [Steps(4, "random", tail=0).draw(Draws(seed), N, (24, 24)) for seed in SEEDS]
    assert set().union(*(each.indices for each in drawn)) == set(range(N))
    assert {len(each.indices) for each in drawn} == {4, 5}  # with the deep step, which may be one of the four


def test_no_step_lies_above_the_deep_one_but_the_tail():
    """Of a wide bracket, those after the deep step are dropped."""
    drawn = [Steps(2, jitter=0.4, tail=0).draw(Draws(seed), N, (8, 8)) for seed in SEEDS]
    assert all(max(each.indices) == 8 for each in drawn)


def test_without_an_identity_loss_nobody_visits_the_deep_step():
    for seed in SEEDS:
        with_it, without = (Steps(tail=1).draw(Draws(seed), N, (14, 20), identity) for identity in (True, False))
        assert set(with_it.indices) - set(without.indices) == {with_it.deep}  # the rest of the draw is the same
    assert Steps(0, tail=0).draw(Draws(0), N, (14, 20), False).indices  # something is learnt in every step


def test_a_band_of_noise_levels():
    sigma = sigmas(N, SHIFT)
    first, last = band_of_sigma(sigma, 0.56, 0.80)
    assert (first, last) == (14, 19)
    assert sigma[first] <= 0.80 < sigma[first - 1] and sigma[last] >= 0.56 > sigma[last + 1]
    with pytest.raises(UserError, match="no step has a noise level from 0.01 to 0.1; the nearest is 0.172"):
        band_of_sigma(sigma, 0.01, 0.1)


def test_a_straight_path_ends_at_its_clip():
    """x = (1 − σ) z + σ ε has the flow ε − z everywhere: each step gives back z, and so does the whole path."""
    z, e = torch.randn(2, 2, 32, 3, 2, 2)
    sigma = sigmas(N, SHIFT)
    for level in sigma:
        torch.testing.assert_close(clean((1 - level) * z + level * e, e - z, level), z, rtol=0, atol=1e-6)
    kept = rollout(lambda x, i: (e - z, e - z), e, sigma, tuple(range(N)))
    for each in kept:
        level = sigma[each.index]
        torch.testing.assert_close(each.x, (1 - level) * z + level * e, rtol=0, atol=2e-6)


def test_a_rollout_keeps_what_it_is_asked_for_and_stops():
    seen = []

    def teacher(x, i):
        seen.append(i)
        return -x, -2 * x  # as with guidance: the path follows another flow than the one that is kept

    x = torch.randn(4, requires_grad=True)
    sigma = sigmas(N, SHIFT)
    kept = rollout(teacher, x, sigma, (0, 3, 6))
    assert seen == list(range(7)) and [each.index for each in kept] == [0, 3, 6]
    assert all(torch.equal(each.v, -each.x) and not each.x.requires_grad for each in kept[1:])
    after = x.detach() * torch.prod(1 - 2 * (sigma[1:4] - sigma[:3]))
    torch.testing.assert_close(kept[1].x, after)


def test_noise_depends_on_the_seed_and_the_sample_only():
    a, b, c = noise(1, 2, (3, 4)), noise(1, 3, (3, 4)), noise(2, 2, (3, 4))
    assert torch.equal(a, noise(1, 2, (3, 4))) and not torch.equal(a, b) and not torch.equal(a, c)
    assert noise(0, 0, (200, 200)).std() == pytest.approx(1, abs=0.02)
