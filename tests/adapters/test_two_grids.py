"""Adapters between spaces of two grids: the finer latent is unshuffled, the network works on the coarser grid."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import direction_of, load_adapter, save_adapter
from kvae_comfyui.adapters.hybrid import HybridVAE, from_kvae_pixels, to_kvae_pixels
from kvae_comfyui.adapters.networks import Affine, PointwiseNet, Residual
from kvae_comfyui.adapters.shuffle import on_one_grid, shuffled, unshuffled
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.kvae.engine.plan import MARGIN
from kvae_comfyui.kvae.frames import regroup, with_last
from kvae_comfyui.serving.about import about
from kvae_comfyui.serving.host_vae import HostVAE
from small_models import assert_same, joined, small

H, H15, K, K16 = map(latent_space, ("hunyuan_video", "hunyuan_video_1.5", "kvae_3d_1.0", "kvae_3d_2.0_t4s16"))
WAYS = [(H, K16), (K16, H), (K, H15), (H15, K)]  # finer → coarser, and back


def adapter(source, target, kind=Affine, *settings):
    """A frozen adapter with random weights."""
    side = max(source.spatial_factor, target.spatial_factor)
    channels = (space.channels * (side // space.spatial_factor) ** 2 for space in (source, target))
    network = kind(*channels, *settings)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return LatentAdapter(network, source, target).eval().requires_grad_(False)


def latent(space, t=3, height=64, width=96, batch=1):
    return torch.randn(batch, *space.latent_shape(4 * t - 3, height, width))


@pytest.mark.parametrize("r", [1, 2, 3])
def test_frames_are_rearranged_as_torch_rearranges_images(r):
    z = torch.randn(2, 4, 3, 2 * r, 5 * r)[:, :, 1:]
    images = z.transpose(1, 2).flatten(0, 1)
    expected = F.pixel_unshuffle(images, r).unflatten(0, (2, 2)).transpose(1, 2)
    assert torch.equal(unshuffled(z, r), expected)
    assert torch.equal(shuffled(unshuffled(z, r), r), z)
    assert torch.equal(on_one_grid(z, expected)[0], expected) and torch.equal(on_one_grid(expected, z)[1], expected)


@pytest.mark.parametrize(("source", "target"), WAYS, ids=lambda space: space.name)
@pytest.mark.parametrize("kind", [(Affine,), (Residual, 8, 1), (PointwiseNet,)], ids=lambda kind: kind[0].__name__)
def test_a_latent_goes_to_the_grid_of_the_target_whole_or_in_pieces(source, target, kind):
    each = adapter(source, target, *kind)
    for t in (1, 6, 9):
        z = latent(source, t, batch=2).contiguous(memory_format=torch.channels_last_3d)
        whole = each(z)
        assert whole.shape == (2, *target.latent_shape(4 * t - 3, 64, 96))
        network_z, network_y = on_one_grid(z, whole)
        assert_same(network_y, each.network(network_z), 1e-6)
        streamed = torch.cat(list(each.stream(z)), 2)
        assert_same(streamed, whole, 1e-6)
        assert torch.equal(streamed, whole) or kind[0] is PointwiseNet
        assert torch.equal(each.convert(z), streamed)
        assert_same(each.convert(z.bfloat16()).float(), whole, 2e-2)


@pytest.mark.parametrize(("source", "target"), WAYS, ids=lambda space: space.name)
@pytest.mark.parametrize("kind", [(Affine,), (Affine, 1), (Residual, 8, 1), (PointwiseNet,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_stream_takes_is_counted_beforehand(source, target, kind, dtype):
    each = adapter(source, target, *kind)
    for t, height, width in ((1, 128, 160), (9, 240, 256), (22, 128, 192)):
        z, kept = latent(source, t, height, width).to(dtype), 0
        with PeakMemory() as memory:
            for _ in with_last(regroup(each.stream(z), 5, 4)):
                kept = max(kept, memory.now)
        counted = each.conversion(t, *z.shape[3:], dtype)
        assert memory.peak <= MARGIN * counted.peak <= 2.2 * memory.peak
        assert t == 1 or kept <= counted.kept <= counted.peak


def test_sides_that_make_no_whole_latents_are_refused_with_sizes_that_do():
    each = adapter(H, K16)
    for convert in (each, each.convert, lambda z: next(each.stream(z))):
        with pytest.raises(ValueError, match="has 45 rows and 60 columns; .* multiples of 16 pixels, .* 480x352"):
            convert(torch.zeros(1, 16, 2, 45, 60))
    with pytest.raises(ValueError, match=r"a hunyuan_video latent is \[B, 16, t, h, w\]"):
        each(torch.zeros(1, 64, 2, 4, 4))


# ---- files


@pytest.mark.parametrize(("source", "target"), WAYS, ids=lambda space: space.name)
def test_an_adapter_survives_writing_and_reading(tmp_path, source, target):
    each, path = adapter(source, target, Residual, 8, 1), tmp_path / "a.safetensors"
    save_adapter(path, each)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "kvae-latent-adapter/2"  # which packs that do not know two grids refuse by name
    assert json.loads(metadata["network"])["unshuffle"] == 2
    assert direction_of(path) == (source.name, target.name)
    loaded, z = load_adapter(path, (source.name, target.name)), latent(source)
    assert torch.equal(loaded(z), each(z)) and loaded.ratios == each.ratios
    grids = "2x2 → 1x1" if source.spatial_factor < target.spatial_factor else "1x1 → 2x2"
    assert f"{source.name} → {target.name}, latents {grids}, Residual" in loaded.about()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unshuffle": 1}, "unshuffle is 1, hunyuan_video → kvae_3d_2.0_t4s16 needs 2"),
        ({"unshuffle": None}, "unshuffle is None"),
        ({"unshuffle": 10**9}, "unshuffle is 1000000000"),
        ({"in_channels": 16}, "a network from 16 to 64 channels"),
    ],
    ids=str,
)
def test_a_file_whose_factor_is_not_that_of_its_spaces_is_refused(tmp_path, changes, words):
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter(H, K16))
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    metadata["network"] = json.dumps(json.loads(metadata["network"]) | changes)
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)


# ---- the KVAE behind the latents of the other grid

SERVED = [("2.0-t4s16", H), ("1.0", H15)]


def hybrid(name, space, kind=HybridVAE):
    kvae = small(name)
    native = K16 if name == "2.0-t4s16" else K
    return kind(kvae, adapter(space, native, Residual, 8, 1), adapter(native, space, Residual, 8, 1))


@pytest.mark.parametrize(("name", "space"), SERVED)
def test_a_hybrid_vae_serves_the_grid_of_the_other_space(name, space):
    vae = hybrid(name, space)
    assert vae.space == space and vae.side == 16
    x = torch.rand(1, 3, 21, 32, 48) * 2 - 1
    z = vae.encode(x)
    assert z.shape == (1, *space.latent_shape(21, 32, 48))
    assert torch.equal(z, vae.encode_adapter.convert(vae.kvae.encode(to_kvae_pixels(x))))
    y = vae.decode(z)
    assert y.shape == x.shape
    assert torch.equal(y, from_kvae_pixels(vae.kvae.decode(vae.decode_adapter.convert(z))))
    assert_same(joined(vae.decode_stream(z)), y)
    assert vae.encode(x[..., :20, :33]).shape == z.shape  # the last row and column are repeated


@pytest.mark.parametrize(("name", "space"), SERVED)
def test_a_host_sees_latents_sizes_tiles_and_memory_of_the_served_space(name, space):
    host = hybrid(name, space, HostVAE)
    x = torch.rand(1, 3, 9, 64, 96) * 2 - 1
    z = host.encode(x)
    assert z.shape == (1, *space.latent_shape(9, 64, 96)) and host.decode_output_shape(z.shape) == x.shape
    whole = host.decode(z)
    assert_same(whole, host.vae.decode(z))
    assert_same(torch.cat(list(host.decode_stream(z)), 2), whole)
    assert_same(host.encode_stream(lambda: x.split(4, 2), x.shape), z)
    tile = 64 // space.spatial_factor
    assert host.decode_tiled(z, tile, tile, tile // 4).shape == x.shape
    assert host.encode_tiled(x, 64, 64, 32).shape == z.shape
    assert host.memory_used_decode(z.shape, torch.float32) > 0  # hosts ask before anything is checked
    for shape in (z.shape, z[0].shape, (1, 16, 0, 3, 5)):
        assert host.memory_used_decode(shape, torch.float32) > 0
    native = HostVAE(host.kvae)
    assert host.preferred_decode_tile(1e9, torch.float32) * space.spatial_factor % 16 == 0
    decoded = native.memory_used_decode(native.encode(x).shape, torch.float32)
    assert decoded < host.memory_used_decode(z.shape, torch.float32) < 2 * decoded + host._adapter_bytes()
    assert "832x480" in about(host, ["kvae", "h2k", "k2h"])


def test_the_memory_of_a_decode_is_not_more_than_was_asked_for():
    host = hybrid("2.0-t4s16", H, HostVAE)
    z = latent(H, 9, 128, 192)
    asked = host.memory_used_decode(z.shape, torch.float32)
    out = torch.empty(host.decode_output_shape(z.shape))
    with PeakMemory() as memory:
        host.decode(z, out)
    assert memory.peak <= asked


def test_a_host_refuses_odd_sides_before_any_work():
    host = hybrid("2.0-t4s16", H, HostVAE)
    z = torch.zeros(1, 16, 2, 6, 5)
    for refused in (host.decode, host.decode_tiled, host.decode_stream, lambda z: host.check_room(z.shape, True)):
        with pytest.raises(ValueError, match="6 rows and 5 columns; .* multiples of 16 pixels, for example 32x48"):
            list(refused(z) or ())
    with pytest.raises(ValueError, match="at least one frame and 16 x 16 pixels"):
        host.encode(torch.zeros(1, 3, 5, 32, 8))
