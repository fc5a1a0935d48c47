"""A LoRA on the tiny network: what it changes, in which precision, and what is left when it is off."""

import re

import pytest
import torch

import needs
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.vfl.lora import TARGETS, add_lora, base_of, lora_of, lora_parameters, put_lora
from kvae_comfyui.training.vfl.lora_pairs import Pair
from tiny_flow import SHAPE, conditions, flow, tiny_network

needs.package("peft", "requirements-vfl.txt")
X = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(1))
LEVEL = torch.tensor(0.8)


def run(network):
    with torch.no_grad():
        return flow(network, conditions(1), X, LEVEL)


def test_the_published_targets_of_the_real_network():
    """543 layers and 53.4 M numbers at rank 16, counted on the network's shapes."""
    diffusers = needs.package("diffusers", "requirements-vfl.txt")
    with torch.device("meta"):
        network = diffusers.HunyuanVideo15Transformer3DModel()
    layers = {name: each for name, each in network.named_modules() if isinstance(each, torch.nn.Linear)}
    found = {kind: [layers[name] for name in layers if re.fullmatch(TARGETS[kind], name)] for kind in TARGETS}
    assert {kind: len(each) for kind, each in found.items()} == {"published": 543, "attention": 432, "all": 759}
    count = sum(16 * (each.in_features + each.out_features) for each in found["published"])
    assert count == pytest.approx(53.4e6, rel=1e-3)


def test_a_fresh_lora_changes_nothing_and_an_absent_one_neither():
    network = tiny_network()
    before = run(network)
    add_lora(network, "published", rank=4, alpha=8)
    assert torch.equal(run(network), before)
    parameters = lora_parameters(network)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        name for name, p in network.named_parameters() if any(p is each for each in parameters.values())
    }
    optimiser = torch.optim.SGD(parameters.values(), lr=1.0)
    for _ in range(3):
        flow(network, conditions(1), X, LEVEL).square().mean().backward()
        optimiser.step()
    assert not torch.equal(run(network), before)
    with base_of(network):
        assert torch.equal(run(network), before)
    assert not torch.equal(run(network), before)


def test_a_lora_on_a_bfloat16_base_is_float32():
    network = tiny_network().to(torch.bfloat16)
    add_lora(network, "attention", rank=4, alpha=4)
    assert {p.dtype for p in lora_parameters(network).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        flow(network, {k: v.bfloat16() for k, v in conditions(1).items()}, X.bfloat16(), LEVEL).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in lora_parameters(network).values())


def test_the_seed_decides_what_a_lora_starts_from():
    starts = []
    for seed in (1, 1, 2):
        network = tiny_network()
        torch.manual_seed(len(starts))
        before = torch.random.get_rng_state()
        add_lora(network, "attention", 4, 4, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        starts.append(next(iter(lora_of(network).values())))
    assert torch.equal(starts[0].a, starts[1].a) and not torch.equal(starts[0].a, starts[2].a)
    assert not starts[0].b.any() and starts[0].alpha == 4


def test_a_lora_of_several_ranks_comes_back():
    """Each layer keeps its own rank and alpha, and no layer gets one whose name only ends in the same way."""
    network = tiny_network()
    sizes = {"norm_out.linear": (64, 32, 2, 5.0), "transformer_blocks.1.attn.to_q": (32, 32, 3, 1.5)}
    lora = {name: Pair(torch.randn(r, i), torch.randn(o, r), alpha) for name, (o, i, r, alpha) in sizes.items()}
    weights = {name: dict(network.named_modules())[name].weight.clone() for name in lora}
    put_lora(network, lora)
    found = lora_of(network)
    assert found.keys() == lora.keys()
    for name, pair in lora.items():
        assert torch.equal(found[name].a, pair.a) and torch.equal(found[name].b, pair.b)
        assert (found[name].rank, found[name].alpha) == (pair.rank, pair.alpha)
        layer = dict(network.named_modules())[name]
        x = torch.randn(2, 32)
        torch.testing.assert_close(
            layer(x), x @ (weights[name] + pair.alpha / pair.rank * pair.b @ pair.a).T + layer.base_layer.bias
        )


def test_a_lora_of_another_network_is_refused():
    network = tiny_network()
    with pytest.raises(WeightsError, match="transformer_blocks.7.attn.to_q, which this network lacks"):
        put_lora(network, {"transformer_blocks.7.attn.to_q": Pair(torch.ones(1, 32), torch.ones(32, 1), 1)})
    with pytest.raises(WeightsError, match=re.escape("is [32, 16], the network's [32, 32]")):
        put_lora(network, {"transformer_blocks.1.attn.to_q": Pair(torch.ones(1, 16), torch.ones(32, 1), 1)})
    with pytest.raises(WeightsError, match="Linear has none of the layers"):
        add_lora(torch.nn.Linear(2, 2), "all", 1, 1)
    assert not getattr(network, "peft_config", None)
