"""One sample's part of an optimiser's step, on the tiny network."""

import pytest
import torch

import needs
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.lora import add_lora, base_of, fill_gradients, lora_parameters
from kvae_comfyui.training.vfl.losses import learn
from kvae_comfyui.training.vfl.path import Drawn, Steps, noise, rollout, sigmas
from kvae_comfyui.training.vfl.step import Recipe, lora_step
from tiny_flow import SHAPE, conditions, flow, tiny_network

needs.package("peft", "requirements-vfl.txt")
SEED, K = 3, 8
X = noise(SEED, K, (1, *SHAPE))


class Case:
    """A network with a LoRA that has left zero, and a count of its passes."""

    def __init__(self) -> None:
        self.network, self.given, self.passes = tiny_network(), conditions(1), {True: 0, False: 0}
        add_lora(self.network, "attention", rank=2, alpha=2)
        self.parameters = lora_parameters(self.network).values()
        for parameter in self.parameters:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))

    def velocity(self, x, i):
        self.passes[torch.is_grad_enabled()] += 1
        return flow(self.network, self.given, x, self.recipe.sigma[i])

    recipe = Recipe(sigmas(8, 5.0), Steps(1), band=(3, 5), weight=0.5, warmup=4, every=2)

    def identity(self, z, of_teacher):
        return z.sin().square().mean()

    def gradient(self):
        fill_gradients(iter(self.parameters))
        found = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        self.network.zero_grad()
        return found


@pytest.fixture(scope="module")
def case():
    return Case()


def test_it_is_the_teachers_path_and_then_both_losses(case):
    losses = lora_step(case.network, case.velocity, X, case.recipe, SEED, K, 2, case.identity)
    ours, sigma = case.gradient(), case.recipe.sigma
    drawn = Steps(1).draw(Draws(SEED, "steps", K), 8, (3, 5))
    with base_of(case.network):
        kept = rollout(lambda x, i: (case.velocity(x, i),) * 2, X, sigma, drawn.indices)
    expected = learn(case.velocity, kept, sigma, drawn.deep, case.identity, 0.5 * 3 / 4)  # warm after four steps
    assert losses == expected and losses.distill > 0
    assert torch.equal(ours, case.gradient()) and ours.any()


def test_the_identity_loss_is_on_in_every_second_step_and_never_without_a_weight(case):
    assert [case.recipe.looks(step) for step in range(4)] == [True, False, True, False]
    assert not Recipe(sigmas(8, 5.0), weight=0).looks(0)
    losses = lora_step(case.network, case.velocity, X, case.recipe, SEED, K, 1, case.identity)
    assert losses.identity != losses.identity
    case.gradient()


def test_processes_that_hold_parts_of_one_base_take_as_many_passes(case):
    """Whatever their samples need; and the gradient of a sample stays as it is, bit for bit."""
    recipe = case.recipe
    all_drawn = {k: recipe.drawn(SEED, k, 0) for k in range(1, 4)}
    assert len({drawn.indices[-1] for drawn in all_drawn.values()}) == 2
    assert len({len(drawn.indices) for drawn in all_drawn.values()}) == 2
    counts = []
    for k in all_drawn:
        lora_step(case.network, case.velocity, noise(SEED, k, X.shape), recipe, SEED, k, 0, case.identity)
        alone = case.gradient()
        case.passes.update({True: 0, False: 0})
        partners = [drawn for other, drawn in all_drawn.items() if other != k]
        x = noise(SEED, k, X.shape)
        lora_step(case.network, case.velocity, x, recipe, SEED, k, 0, case.identity, partners=partners)
        counts.append(dict(case.passes))
        assert torch.equal(case.gradient(), alone)
    assert all(each == counts[0] for each in counts)


def test_guidance_moves_the_path_but_not_the_target(case):
    """The student's target is the flow without guidance, at the states that guidance leads to."""
    seen = []

    def teacher(x, i):
        v = case.velocity(x, i)
        seen.append((i, x))
        return v, 3 * v

    drawn = case.recipe.drawn(SEED, K, 0)
    assert isinstance(drawn, Drawn)
    guided = lora_step(case.network, case.velocity, X, case.recipe, SEED, K, 0, case.identity, teacher)
    plain = lora_step(case.network, case.velocity, X, case.recipe, SEED, K, 0, case.identity)
    case.gradient()
    assert [i for i, _ in seen] == list(range(drawn.indices[-1] + 1))
    assert guided.flow != plain.flow
    with base_of(case.network), torch.no_grad():
        flows = [case.velocity(x, i).square().mean() for i, x in seen if i in drawn.indices]
    assert guided.flow == pytest.approx(torch.stack(flows).mean().item(), rel=1e-6)
