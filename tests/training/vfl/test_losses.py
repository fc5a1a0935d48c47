"""The losses of a LoRA, on the tiny network: their gradient against one plain backward of everything at once."""

import math

import pytest
import torch

import needs
from kvae_comfyui.training.vfl.lora import add_lora, base_of, fill_gradients, lora_parameters
from kvae_comfyui.training.vfl.losses import identity_weight, learn
from kvae_comfyui.training.vfl.path import clean, rollout
from tiny_flow import SHAPE, SIGMA, STEPS, conditions, flow, tiny_network

needs.package("peft", "requirements-vfl.txt")

DEEP, INDICES, WEIGHT = 17, (6, 12, 17, 22), 0.15


class Case:
    """A network with a LoRA that has left zero, and a path of its base."""

    def __init__(self, batch: int = 2, started: bool = True):
        self.network = tiny_network()
        add_lora(self.network, "published", rank=4, alpha=4)
        self.parameters = lora_parameters(self.network)
        if started:
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    if name.endswith(".b"):
                        parameter.normal_(std=0.05, generator=generator)
        self.given = conditions(batch)
        x = torch.randn((batch, *SHAPE), generator=torch.Generator().manual_seed(1))
        with base_of(self.network):
            self.kept = rollout(lambda x, i: (self.student(x, i),) * 2, x, SIGMA, INDICES)
        self.target = torch.randn((batch, *SHAPE), generator=torch.Generator().manual_seed(2))

    def student(self, x, i):
        return flow(self.network, self.given, x, SIGMA[i])

    def identity(self, z, of_teacher=None):
        return (z - self.target).abs().sin().mean()

    def gradients(self):
        """The gradients as one vector; resets them."""
        fill_gradients(self.parameters.values())
        found = torch.cat([parameter.grad.flatten() for parameter in self.parameters.values()])
        self.network.zero_grad()
        return found


@pytest.fixture(scope="module")
def case():
    return Case()


def test_both_halves_and_every_step_give_the_gradient_of_the_whole(case):
    losses = learn(case.student, case.kept, SIGMA, DEEP, case.identity, WEIGHT)
    ours = case.gradients()
    flows = {each.index: case.student(each.x, each.index) for each in case.kept}
    distill = sum((flows[each.index] - each.v).square().mean() for each in case.kept) / len(INDICES)
    deep = next(each for each in case.kept if each.index == DEEP)
    identity = case.identity(clean(deep.x, flows[DEEP], SIGMA[DEEP]))
    (distill + WEIGHT * identity).backward()
    plain = case.gradients()
    assert plain.any()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    assert losses.distill == pytest.approx(distill.item(), rel=1e-6)
    assert losses.identity == pytest.approx(identity.item(), rel=1e-6)
    assert losses.flow == pytest.approx(sum(each.v.square().mean().item() for each in case.kept) / 4, rel=1e-6)


def test_what_looks_at_the_clip_is_given_the_teachers_estimate_too(case):
    seen = []
    learn(case.student, case.kept, SIGMA, DEEP, lambda z, of_teacher: seen.append(of_teacher) or z.sum(), WEIGHT)
    case.gradients()
    deep = next(each for each in case.kept if each.index == DEEP)
    assert torch.equal(seen[0], clean(deep.x, deep.v, SIGMA[DEEP])) and not seen[0].requires_grad


def test_one_step_after_another_is_one_batch_of_all_steps(case):
    """Steps outermost, each with both samples and their own prompts: the conditions are tiled, not repeated each."""
    learn(case.student, case.kept, SIGMA)
    ours = case.gradients()
    x, v = (torch.cat([getattr(each, key) for each in case.kept]) for key in "xv")
    levels = torch.cat([SIGMA[each.index].expand(2) for each in case.kept])
    tiled = {key: value.repeat(len(INDICES), *[1] * (value.ndim - 1)) for key, value in case.given.items()}
    (flow(case.network, tiled, x, levels) - v).square().mean().backward()
    batch = case.gradients()
    torch.testing.assert_close(ours, batch, rtol=0, atol=1e-5 * batch.abs().max().item())


def test_a_share_scales_the_gradient(case):
    learn(case.student, case.kept, SIGMA, DEEP, case.identity, WEIGHT)
    whole = case.gradients()
    for _ in range(2):
        learn(case.student, case.kept, SIGMA, DEEP, case.identity, WEIGHT, share=0.5)
    torch.testing.assert_close(case.gradients(), whole)


def test_a_lora_without_identity_never_leaves_zero():
    case = Case(batch=1, started=False)
    before = {name: parameter.detach().clone() for name, parameter in case.parameters.items()}
    optimiser = torch.optim.AdamW(case.parameters.values(), lr=1e-2, weight_decay=0)
    for weight in (0.0, 0.0):
        losses = learn(case.student, case.kept, SIGMA, DEEP, case.identity, weight)
        assert losses.distill == 0.0
        assert not case.gradients().any()
        optimiser.step()
    assert all(torch.equal(before[name], parameter) for name, parameter in case.parameters.items())
    learn(case.student, case.kept, SIGMA, DEEP, case.identity, WEIGHT)
    assert case.gradients().any()


def test_without_an_identity_loss_there_is_none(case):
    assert math.isnan(learn(case.student, case.kept, SIGMA).identity)
    case.gradients()


@pytest.mark.parametrize("schedule, half", [("constant", 0.6), ("linear", 0.3), ("cosine", 0.3)])
def test_the_weight_of_the_identity(schedule, half):
    at = [identity_weight(step, 0.6, schedule, 500) for step in (0, 250, 500, STEPS * 1000)]
    assert at == pytest.approx([0.6 if schedule == "constant" else 0, half, 0.6, 0.6])
    assert identity_weight(125, 1, "cosine", 500) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))
    assert identity_weight(0, 0.6, schedule, 0) == 0.6
