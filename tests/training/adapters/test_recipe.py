"""The recipe that trains the adapters, and the ingredients with which a benchmark replaces its parts."""

from functools import partial

import pytest
import torch

from kvae_comfyui.adapters.networks import build_network
from kvae_comfyui.benchmarks.ingredients import (
    ByJacobians,
    WithDecodes,
    ingredients,
    with_cycle,
    with_noise,
    with_statistics,
)
from kvae_comfyui.training.adapters.muon import Muon
from kvae_comfyui.training.adapters.recipe import Recipe, latent_errors, with_change
from kvae_comfyui.training.adapters.ridge import Ridge
from kvae_comfyui.training.adapters.train import TrainConfig
from kvae_comfyui.training.directions import DIRECTIONS


@pytest.fixture
def networks():
    torch.manual_seed(0)
    networks = {name: build_network("residual", in_channels=16, out_channels=16) for name in DIRECTIONS}
    for network in networks.values():
        torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    return networks


@pytest.fixture
def latents():
    torch.manual_seed(1)
    weight = torch.zeros(3, 1, 3, 8, 8)
    weight[:, :, 1:, 2:, :6] = 1 / (2 * 6 * 6)
    return torch.randn(3, 16, 3, 8, 8), torch.randn(3, 16, 3, 8, 8), weight


def test_only_positions_with_weight_count_in_the_errors(networks, latents):
    z_h, z_k, weight = latents
    counted = (slice(None), slice(None), slice(1, None), slice(2, None), slice(None, 6))
    errors = latent_errors(networks, z_h, z_k, weight)
    for name, source, target in (("h2k", z_h, z_k), ("k2h", z_k, z_h)):
        mse = torch.nn.functional.mse_loss(networks[name](source)[counted], target[counted])
        torch.testing.assert_close(errors[name], mse)


@pytest.mark.parametrize("network", ["residual", "affine", "published"])
def test_every_weight_has_one_optimiser(network):
    networks = {name: build_network(network, in_channels=16, out_channels=16) for name in DIRECTIONS}
    for recipe in (Recipe(), Recipe(muon=False)):
        optimisers = recipe.optimisers(networks, 1e-3, 1e-4)
        held = [id(p) for each in optimisers for group in each.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for each in networks.values() for p in each.parameters())
        by_muon = {id(p) for each in optimisers if isinstance(each, Muon) for p in each.param_groups[0]["params"]}
        of_branches = {
            id(module.weight)
            for each in networks.values()
            for name, module in each.named_modules()
            if isinstance(module, torch.nn.Conv3d) and network == "residual" and not name.startswith("affine")
        }
        assert by_muon == (of_branches if recipe.muon else set())


@pytest.mark.parametrize(
    "loss", [partial(with_noise, share=0.0), partial(with_statistics, share=0.0), partial(with_cycle, factor=0.0)]
)
def test_ingredients_without_weight_change_nothing(networks, latents, loss):
    expected, found = latent_errors(networks, *latents), loss(networks, *latents)
    for name, error in found.items():
        torch.testing.assert_close(error, expected.get(name, torch.zeros(())))


def test_only_positions_with_weight_count_in_the_change(networks, latents):
    z_h, z_k, weight = latents
    counted = (slice(None), slice(None), slice(1, None), slice(2, None), slice(None, 6))
    with torch.no_grad():
        errors = with_change(networks, z_h, z_k, weight, {4: 0.5})
        wrong = (networks["h2k"](z_h) - z_k)[counted]
        constant = with_change(networks, z_h, networks["h2k"](z_h) + 1, weight)
    change = (wrong[..., 1:] - wrong[..., :-1]).square().mean() * 5 / 6  # of 6 columns there are 5 changes
    torch.testing.assert_close(errors["h2k axis 4"], 0.5 * change)
    for name, error in constant.items():
        if name.startswith("h2k"):
            assert error == pytest.approx(1 if name == "h2k" else 0, abs=1e-6)


def test_the_decode_loss_trains_one_adapter_and_starts_late(networks, latents):
    z_h, z_k, weight = latents
    loss = WithDecodes(1.0, ("k2h",), after=1)
    assert set(loss(networks, z_h, z_k, weight)) == {"h2k", "k2h"}
    loss(networks, z_h, z_k, weight)["k2h decodes"].backward()
    assert all(p.grad is None for p in networks["h2k"].parameters())
    assert networks["k2h"].affine.conv.weight.grad.norm() > 0


def test_the_jacobian_of_a_linear_decoder_is_its_matrix(latents):
    """y = Az has J'J = A'A."""
    loss = ByJacobians()
    A = torch.diag(torch.arange(1.0, 17)) + torch.ones(16, 16) / 4
    loss.decoders = {"h2k": lambda z: torch.einsum("dc,bcthw->bdthw", A, z)}
    M = A.T @ A
    root = loss.root("h2k", torch.randn(3, 16, 3, 8, 8))
    torch.testing.assert_close(root @ root, 16 * M / M.trace(), rtol=0.2, atol=0.2)


def test_every_ingredient_can_be_trained(latents):
    """The options exist, the networks can start, and losses without a decoder give both networks gradients."""
    fits = {"h2k": Ridge(16, 16, 3), "k2h": Ridge(16, 16, 3)}
    z_many = torch.randn(2, 1, 16, 5, 12, 12)
    fits["h2k"].add(*z_many)
    fits["k2h"].add(*z_many.flip(0))
    for name, (options, recipe) in ingredients().items():
        TrainConfig("", **options)
        networks = recipe.networks("residual", fits)
        if isinstance(recipe.loss, WithDecodes | ByJacobians):  # other tests cover them
            continue
        terms = recipe.loss(networks, *latents)
        torch.stack(list(terms.values())).sum().backward()
        for network in networks.values():
            gradient = network.affine.conv.weight.grad
            assert gradient.isfinite().all() and gradient.norm() > 0, name
