"""Where the base lies: less memory, and the same network."""

import pytest
import torch

import needs
from kvae_comfyui.training.vfl.gradients import GradientSum
from kvae_comfyui.training.vfl.lora import add_lora, base_of, lora_parameters
from kvae_comfyui.training.vfl.placement import Visits, place
from kvae_comfyui.training.vfl.tiny import tiny_pipeline
from tiny_flow import SHAPE, conditions, flow

needs.package("peft", "requirements-vfl.txt")
CPU, LEVEL = torch.device("cpu"), torch.tensor(0.8)
X = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(1))


def network(dtype=torch.float32):
    """A network with a LoRA that has left zero, and checkpoints."""
    found = tiny_pipeline().transformer.requires_grad_(False).to(dtype)
    found.enable_gradient_checkpointing()
    add_lora(found, "published", rank=2, alpha=2)
    for parameter in lora_parameters(found).values():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return found


def learned(found, dtype=torch.float32):
    """A flow, and the gradient of the LoRA by it."""
    v = flow(found, {key: each.to(dtype) for key, each in conditions(1).items()}, X.to(dtype), LEVEL)
    v.float().square().mean().backward()
    gradients = [each.grad for each in lora_parameters(found).values() if each.grad is not None]
    found.zero_grad()
    return v.detach(), gradients


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_blocks_in_host_memory_give_the_same_gradient_and_two_of_them_visit_at_a_time(monkeypatch):
    plain, most, bring = network(), [], Visits._bring

    def watched(self, i):
        bring(self, i)
        away = [any(p.data_ptr() != home.data_ptr() for p, home in homes) for homes in self.homes]
        most.append(sum(away))

    monkeypatch.setattr(Visits, "_bring", watched)
    visited = network()
    place(visited, CPU, "fp32", offload=True)
    for _ in range(2):
        assert same(learned(visited), learned(plain))
        with base_of(visited), base_of(plain), torch.no_grad():
            assert torch.equal(flow(visited, conditions(1), X, LEVEL), flow(plain, conditions(1), X, LEVEL))
    assert max(most) == 2 < len(plain.transformer_blocks)


def test_a_base_in_float8_is_that_of_rounded_weights():
    stored, rounded = network(torch.bfloat16), network(torch.bfloat16)
    place(stored, CPU, "fp8")
    matrices = [each for each in rounded.transformer_blocks.modules() if isinstance(each, torch.nn.Linear)]
    for each in matrices:
        if not each.weight.requires_grad:
            each.weight.data = each.weight.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    place(rounded, CPU, "bf16")
    assert same(learned(stored, torch.bfloat16), learned(rounded, torch.bfloat16))
    of_blocks = [each for each in stored.transformer_blocks.parameters() if each.ndim == 2 and not each.requires_grad]
    assert {each.dtype for each in of_blocks} == {torch.float8_e4m3fn}
    assert {each.dtype for each in lora_parameters(stored).values()} == {torch.float32}


@pytest.mark.parametrize("base_dtype", ["bf16", "fp8"])
def test_without_its_lora_a_base_in_low_precision_is_the_same_before_and_after(base_dtype):
    """The teacher is what inference runs, whatever the LoRA has learned."""
    found = network(torch.bfloat16)
    place(found, CPU, base_dtype, offload=True)
    given = {key: each.bfloat16() for key, each in conditions(1).items()}
    with base_of(found), torch.no_grad():
        before = flow(found, given, X.bfloat16(), LEVEL)
    learned(found, torch.bfloat16)
    with torch.no_grad():
        for each in lora_parameters(found).values():
            each.add_(1)
        assert not torch.equal(flow(found, given, X.bfloat16(), LEVEL), before)
        with base_of(found):
            assert torch.equal(flow(found, given, X.bfloat16(), LEVEL), before)


def test_the_order_of_the_samples_changes_no_bit_of_their_sum():
    class Alone:
        def add(self, tensor):
            return tensor

    parameters = [torch.nn.Parameter(torch.zeros(500)), torch.nn.Parameter(torch.zeros(3))]
    gradients = torch.randn(7, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    sums = []
    for order in (range(7), reversed(range(7)), (3, 0, 6, 1, 5, 2, 4)):
        total = GradientSum(parameters)
        for i in order:
            parameters[0].grad = gradients[i].clone()
            total.take()
        assert total.give(Alone(), torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]
        assert not parameters[1].grad.any()
        sums.append(parameters[0].grad)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    assert torch.equal(sums[0], gradients.double().sum(0).float())
