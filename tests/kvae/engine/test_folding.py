"""Folded weights follow every change of the published ones, and gradients reach all weights that require them."""

import copy

import pytest
import torch

from kvae_comfyui.kvae import KVAE
from small_models import SMALL, assert_same, clip, latent, small


@pytest.mark.parametrize("name", SMALL)
def test_folded_weights_follow_the_published_ones(name):
    kvae = small(name)
    z = latent(kvae, 3, 1, 2)
    before = kvae.decode(z)
    state = {key: 1.1 * tensor for key, tensor in kvae.state_dict().items()}
    assert not any("folded" in key for key in state)
    kvae.load_state_dict(state)  # drops the folded weights
    changed = kvae.decode(z)
    assert not torch.allclose(before, changed, rtol=1e-2)
    assert_same(kvae.fold().decode(z), changed)


def trained(kvae):
    """Take three steps of an optimiser, then freeze the weights again."""
    kvae.requires_grad_(True)
    optimiser = torch.optim.AdamW(kvae.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        kvae.decode(latent(kvae, 2, 1, 1)).square().mean().backward()
        kvae.posterior(clip(kvae, 5, 1, 1)).mean.square().mean().backward()
        optimiser.step()
    kvae.requires_grad_(False)


@torch.no_grad()
def averaged(kvae):
    for parameter in kvae.parameters():
        parameter.lerp_(torch.randn_like(parameter), 0.05)


def by_part(kvae):
    for part in (kvae.encoder, kvae.decoder):
        part.load_state_dict({key: 1.1 * tensor for key, tensor in part.state_dict().items()})


def assigned(kvae):
    kvae.load_state_dict({key: 1.1 * tensor for key, tensor in kvae.state_dict().items()}, assign=True)


def of_one_layer(kvae):
    kvae.decoder.up[1].upsample.spatial_conv.weight.mul_(1.5)
    kvae.encoder.down[0].downsample.linear.bias.add_(1)


def new_parameters(kvae):
    for layer in (kvae.decoder.up[1].upsample, kvae.encoder.down[0].downsample):
        layer.linear.weight = torch.nn.Parameter(1.5 * layer.linear.weight, requires_grad=False)


def new_data(kvae):
    for layer in (kvae.decoder.up[1].upsample, kvae.encoder.down[0].downsample):
        layer.linear.weight.data = 1.5 * layer.linear.weight


def to_and_fro(kvae):
    kvae.bfloat16().float()


@pytest.mark.parametrize(
    "change", [trained, averaged, by_part, assigned, of_one_layer, new_parameters, new_data, to_and_fro]
)
@pytest.mark.parametrize("name", SMALL)
def test_a_change_of_the_weights_is_noticed(name, change):
    """The reference is a new model with the same weights."""
    kvae = small(name)
    z, x = latent(kvae, 3, 1, 2), clip(kvae, 9, 1, 2)
    before = kvae.decode(z), kvae.encode(x)
    change(kvae)
    fresh = KVAE(kvae.config)
    fresh.load_state_dict(kvae.state_dict())
    fresh.requires_grad_(False)
    for old, now, expected in zip(
        before, (kvae.decode(z), kvae.encode(x)), (fresh.decode(z), fresh.encode(x)), strict=True
    ):
        assert_same(now, expected, 1e-6)
        assert (old - expected).norm() > 1e-4 * expected.norm()


def test_frozen_weights_are_folded_once(monkeypatch):
    kvae = small("1.0")
    z = latent(kvae, 3, 1, 2)
    expected = kvae.decode(z)
    for layer in (kvae.decoder.up[1].upsample, kvae.decoder.up[2].upsample, kvae.decoder.up[3].upsample):
        monkeypatch.setattr(layer, "compose", lambda: pytest.fail("folded again"))
    kvae.to("cpu").requires_grad_(True).requires_grad_(False).fold()
    assert torch.equal(kvae.decode(z), expected)


def test_weights_made_in_inference_mode_can_be_folded_and_loaded():
    """As hosts do. Autograd counts no versions in inference mode."""
    with torch.inference_mode():
        kvae = small("2.0-t4s8")
        z = latent(kvae, 3, 1, 2)
        before = kvae.decode(z)
        kvae.decoder.load_state_dict({key: 1.1 * tensor for key, tensor in kvae.decoder.state_dict().items()})
        fresh = KVAE(kvae.config).requires_grad_(False)
        fresh.load_state_dict(kvae.state_dict())
        assert_same(kvae.decode(z), fresh.decode(z))
        assert not torch.allclose(kvae.decode(z), before, rtol=1e-2)


def test_a_copy_is_independent():
    kvae = small("2.0-t4s8")
    z = latent(kvae, 3, 1, 2)
    other = copy.deepcopy(kvae)
    expected = kvae.decode(z)
    averaged(other)
    assert torch.equal(kvae.decode(z), expected)
    assert not torch.allclose(other.decode(z), expected, rtol=1e-2)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_gives_the_same_gradients_in_less_memory(name):
    kvae = small(name).requires_grad_(True)
    z = latent(kvae, 6, 1, 1)

    def gradients() -> tuple[list[torch.Tensor], int]:
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        kvae.zero_grad()
        source = z.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = kvae.decode(source).square().mean()
        loss.backward()
        return [source.grad, *(p.grad for p in kvae.decoder.parameters())], saved

    plain, plain_bytes = gradients()
    kvae.decoder.gradient_checkpointing = True
    again, fewer_bytes = gradients()
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain)
    assert fewer_bytes < 0.5 * plain_bytes


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "part", ["mid.block_1.conv2", "conv_in", "conv_out", "{resampler}.linear", "{resampler}.spatial_conv"]
)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_gradients_reach_the_weights_that_require_them(name, side, part):
    kvae = small(name)
    coder = getattr(kvae, side)
    part = part.format(resampler="down.0.downsample" if side == "encoder" else "up.1.upsample")
    wanted = list(coder.get_submodule(part).requires_grad_(True).parameters())
    decode = side == "decoder"
    y = kvae.decode(latent(kvae, 6, 1, 1)) if decode else kvae.posterior(clip(kvae, 21, 1, 1)).mean
    y.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in wanted)
    other = kvae.encode(clip(kvae, 5, 1, 1)) if decode else kvae.decode(latent(kvae, 2, 1, 1))
    assert not other.requires_grad
    with torch.no_grad():
        z, x = latent(kvae, 6, 1, 1), clip(kvae, 21, 1, 1)
        strips = kvae.decode(z) if decode else kvae.encode(x)
    assert_same(strips, kvae.decode(z) if decode else kvae.encode(x))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_gradients_reach_the_input_of_a_frozen_model(side):
    kvae = small("2.0-t4s16")
    source = (clip(kvae, 21, 1, 1) if side == "encoder" else latent(kvae, 6, 1, 1)).requires_grad_()
    (kvae.encode(source) if side == "encoder" else kvae.decode(source)).square().sum().backward()
    assert source.grad.abs().sum((0, 1, 3, 4)).min() > 0
