"""The published network computes as published; ours give the same for frames, tiles, streams and clips."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import shared
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.networks import Affine, PointwiseNet, Residual, build_network
from kvae_comfyui.training.adapters.ridge import RIDGE, Ridge


def published_by_hand(w, z):
    """The published network in a few lines, with matrix products for the 1x1x1 convolutions."""

    def mix(name, x):
        return torch.einsum("oi,bi...->bo...", w[f"{name}.weight"].flatten(1), x) + w[f"{name}.bias"].view(-1, 1, 1, 1)

    def norm(name, x):
        groups = x.reshape(len(x), 8, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - mean) / (var + 1e-6).sqrt()).view(x.shape)
        return x * w[f"{name}.weight"].view(-1, 1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1, 1)

    h = mix("in_proj", z)
    for i in range(3):
        r = norm(f"blocks.{i}.norm1", h)
        r = mix(f"blocks.{i}.conv1", r * r.sigmoid())
        r = norm(f"blocks.{i}.norm2", r)
        h = h + mix(f"blocks.{i}.conv2", r * r.sigmoid())
    return mix("out_proj", h)


@pytest.mark.parametrize("name", ["adapter_hunyuan_to_kvae3d", "adapter_kvae3d_to_hunyuan"])
def test_published_files_give_what_their_weights_give_by_hand(name):
    path = shared(f"seed_adapters/{name}.safetensors")
    adapter = load_adapter(path)
    assert sum(p.numel() for p in adapter.parameters()) == 2368
    z = torch.randn(2, 16, 3, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(adapter(z), published_by_hand(load_file(path), z), rtol=1e-4, atol=1e-4)


def test_pointwise_net_is_the_published_network_by_hand():
    network = PointwiseNet(16, 16)
    assert sum(p.numel() for p in network.parameters()) == 2368
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5)
    z = torch.randn(2, 16, 3, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(z), published_by_hand(network.state_dict(), z), rtol=1e-4, atol=1e-4)


def randomised(network, std=0.2):
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network.double().eval().requires_grad_(False)


OURS = [
    Affine(16, 16, 1),
    Affine(16, 16, 3),
    Affine(32, 64, 3),
    Residual(16, 16, width=8, blocks=2),
    Residual(32, 64, width=8, blocks=1),
]


@pytest.mark.parametrize("network", OURS, ids=lambda n: f"{type(n).__name__}{n.config}")
def test_a_frame_a_tile_and_a_stream_give_the_same_as_the_clip(network):
    network = randomised(network)
    z = torch.randn(1, network.config["in_channels"], 7, 12, 14).double()
    whole = network(z)
    assert whole.shape == (1, network.config["out_channels"], 7, 12, 14)
    same = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(network(z[:, :, :1]), whole[:, :, :1], **same)
    r = network.radius
    tile = network(z[..., 4 - r : 8 + r, 5 - r : 9 + r])[..., r : r + 4, r : r + 4]
    torch.testing.assert_close(tile, whole[..., 4:8, 5:9], **same)
    cache = {}
    stream = torch.cat([network(piece, cache) for piece in z.split([1, 3, 2, 1], dim=2)], dim=2)
    torch.testing.assert_close(stream, whole, **same)


def test_pointwise_net_depends_on_the_whole_clip():
    network = randomised(PointwiseNet(16, 16), std=0.5)
    z = torch.randn(1, 16, 7, 12, 14).double() * torch.linspace(1, 3, 7).view(-1, 1, 1)
    whole = network(z)
    alone = (network(z[:, :, :1]) - whole[:, :, :1]).norm() / whole[:, :, :1].norm()
    tile = (network(z[..., :6, :7]) - whole[..., :6, :7]).norm() / whole[..., :6, :7].norm()
    assert alone > 0.05
    assert tile > 0.005
    with pytest.raises(ValueError, match="call it with the whole clip"):
        network(z, {})


def test_a_tile_needs_its_whole_receptive_field():
    """A margin of one latent less than the radius changes the tile."""
    network = randomised(Residual(16, 16, width=8, blocks=2))
    z = torch.randn(1, 16, 3, 14, 14).double()
    r = network.radius - 1
    tile = network(z[..., 5 - r : 9 + r, 5 - r : 9 + r])[..., r : r + 4, r : r + 4]
    assert (tile - network(z)[..., 5:9, 5:9]).abs().max() > 1e-6


@pytest.mark.parametrize("kernel", [1, 3])
def test_ridge_recovers_a_map(kernel):
    truth = Affine(4, 6, kernel).requires_grad_(False)
    ridge = Ridge(4, 6, kernel)
    for _ in range(6):
        z = torch.randn(2, 4, 5, 8, 8) * 2 + 1
        ridge.add(z, truth(z))
    solved = ridge.solve()
    torch.testing.assert_close(solved.affine.conv.weight, truth.affine.conv.weight, rtol=1e-2, atol=1e-3)
    z = torch.randn(1, 4, 5, 8, 8)
    torch.testing.assert_close(solved(z), truth(z), rtol=1e-2, atol=1e-2)


def test_ridge_is_the_textbook_solution():
    """Compared with one dense least-squares problem over all pairs, with neighbourhoods cut out by hand."""
    pairs = [(torch.randn(1, 3, 4, 5, 6), torch.randn(1, 2, 4, 5, 6)) for _ in range(3)]
    ridge = Ridge(3, 2, 3)
    rows, targets = [], []
    for x, y in pairs:
        ridge.add(x, y)
        padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
        for t in range(4):
            for i in range(5):
                for j in range(6):
                    rows.append(padded[0, :, t : t + 3, i : i + 3, j : j + 3].flatten().double())
                    targets.append(y[0, :, t, i, j].double())
    a, b = torch.stack(rows), torch.stack(targets)
    a0, b0 = a - a.mean(0), b - b.mean(0)
    penalty = (RIDGE * a0.square().sum(0)).sqrt().diag()
    weight = torch.linalg.lstsq(torch.cat([a0, penalty]), torch.cat([b0, torch.zeros(len(penalty), 2).double()]))[0]
    conv = ridge.solve().affine.conv
    torch.testing.assert_close(conv.weight.flatten(1).double(), weight.T, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(conv.bias.double(), b.mean(0) - weight.T @ a.mean(0), rtol=1e-3, atol=1e-5)
    assert ridge.target_variance() == pytest.approx(b0.square().mean().item(), rel=1e-5)


def test_ridge_refuses_too_few_positions():
    ridge = Ridge(16, 16, 3)
    ridge.add(torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4))
    with pytest.raises(ValueError, match="32 latent positions cannot fix 432 weights"):
        ridge.solve()


def test_residual_starts_at_its_affine_map():
    network = Residual(16, 16)
    affine = Affine(16, 16, 3)
    network.affine.load_state_dict(affine.affine.state_dict())
    z = torch.randn(1, 16, 3, 6, 6)
    assert torch.equal(network(z), affine(z))


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="known ones are published, affine, residual"):
        build_network("unet")
    with pytest.raises(ValueError, match="does not accept these settings"):
        build_network("affine", width=3)
