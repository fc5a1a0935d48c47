"""The loss of the identity head against loops over its formula, and the figures of its validation."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from kvae_comfyui.training.vfl.contrast import compare, equal_error, figures, supcon
from kvae_comfyui.training.vfl.schedule import Cosine


def loops(f: torch.Tensor, who: list[int], temperature: float) -> torch.Tensor:
    """The formula of `supcon`, term by term, in float64."""
    f = f.double()
    losses = []
    for i in range(len(who)):
        positives = [p for p in range(len(who)) if p != i and who[p] == who[i]]
        if not positives:
            continue
        total = sum(torch.exp(f[i] @ f[a] / temperature) for a in range(len(who)) if a != i)
        losses.append(-sum(f[i] @ f[p] / temperature - torch.log(total) for p in positives) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("who", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 7, 2, 2, 2, 2], [3, 1, 3, 1]])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_the_loss_and_its_gradient_are_those_of_loops(who, temperature):
    x = torch.randn(len(who), 6, requires_grad=True)
    gradients, values = [], []
    for loss in (loops(normalize(x.double(), dim=1), who, temperature), None):
        if loss is None:
            loss = supcon(normalize(x, dim=1), torch.tensor(who), temperature)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert values[1] == pytest.approx(values[0], abs=1e-5, rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_in_float64_the_loss_is_that_of_loops_to_the_last_digits():
    f, who = normalize(torch.randn(12, 8, dtype=torch.float64), dim=1), [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4]
    assert abs(supcon(f, torch.tensor(who), 0.1) - loops(f, who, 0.1)) < 1e-12


def test_identities_that_are_equal_and_apart_cost_what_they_must():
    """Two identities, opposite to each other, two pictures each: each sum is e^(1/τ) + 2 e^(−1/τ)."""
    f = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    expected = math.log1p(2 * math.exp(-2 / 0.5))
    assert supcon(f, torch.tensor([0, 0, 1, 1]), 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_figures_count_every_pair_once():
    angles = torch.tensor([0.0, 0.2, 1.0, 1.6])
    f, who = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([5, 5, 9, 9])
    part = compare(f, who, 0.1)
    same, other = [math.cos(0.2), math.cos(0.6)], [math.cos(each) for each in (1.0, 1.6, 0.8, 1.4)]
    assert sorted(part.same.tolist()) == pytest.approx(sorted(same), abs=1e-6)
    assert sorted(part.other.tolist()) == pytest.approx(sorted(other), abs=1e-6)
    found = figures([part, part])
    assert found["same"] == pytest.approx(sum(same) / 2) and found["other"] == pytest.approx(sum(other) / 4)
    assert found["gap"] == pytest.approx(found["same"] - found["other"])
    assert found["retrieval"] == 1 and found["loss"] == pytest.approx(supcon(f, who, 0.1).item())
    assert found["error"] == 0 and max(other) < found["threshold"] <= min(same) + 1e-6


def test_a_picture_is_not_its_own_nearest():
    angles = torch.tensor([0.0, 0.2, 0.5, 1.6])  # the third is nearer to the second than to the fourth
    part = compare(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([5, 5, 9, 9]), 0.1)
    assert part.hits.tolist() == [True, True, False, True]


def test_batches_of_other_sizes_count_by_their_pictures():
    small = compare(torch.eye(4), torch.tensor([0, 0, 1, 1]), 0.1)
    large = compare(torch.eye(2).repeat_interleave(4, 0), torch.arange(2).repeat_interleave(4), 0.1)
    found = figures([small, large])
    assert found["loss"] == pytest.approx((4 * small.loss + 8 * large.loss) / 12)
    assert found["same"] == pytest.approx(12 / 14)


def test_errors_are_equally_frequent_at_the_threshold():
    same, other = torch.randn(4000) + 1, torch.randn(6000) - 1
    threshold, error = equal_error(same, other)
    assert abs(threshold) < 0.05 and error == pytest.approx(0.1587, abs=0.01)  # Φ(−1)
    missed, taken = (same < threshold).float().mean().item(), (other >= threshold).float().mean().item()
    assert missed == pytest.approx(taken, abs=0.002)


def test_the_rate_rises_then_falls_to_zero_as_half_a_cosine():
    schedule = Cosine(2.0, total_steps=100, warmup_steps=10)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0) and rates[99] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert Cosine(1.0, total_steps=1).rate(0) == 1
